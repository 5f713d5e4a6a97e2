"""The answers of `grscale fit` as lines of text."""

from typing import TYPE_CHECKING

from fit.cli_answer import INTERVAL
from fit.words import explain

if TYPE_CHECKING:
    from fit.cli_answer import Answer, Curves, Predicted
    from fit.compare import Comparison
    from fit.holdout import Holdout
    from fit.law_saturation import SaturationSize
    from fit.profile import Profile


def readable(answer: "Answer") -> str:
    """Parameters with intervals, objective, verdict, what else was asked, warnings in words."""
    result = answer.result
    lines = [f"{result.law}: {result.definition.formula}   ({result.n} rows, {result.loss})"]
    if result.groups is not None:
        shared = f"shared: {', '.join(result.groups.shared)}" if result.groups.shared else "nothing shared"
        lines.append(f"groups by {result.groups.column!r}: {', '.join(result.groups.levels)}; {shared}")
    lines += ["", *_parameters(answer)]
    if result.reduced is not None:
        lines.append(f"what these data do identify: {result.reduced}")
    lines += ["", f"objective {result.objective:.10g} (sum over rows)"]
    if result.aicc is not None:
        lines.append(f"AICc {result.aicc:.2f}")
    if result.saturation is not None:
        lines.append(f"{result.saturation.verdict}: {result.saturation.reason}")
    warnings = [*result.warnings, *(result.saturation.warnings if result.saturation else ())]
    warnings += [code for profile in answer.profiles.values() for code in profile.warnings]
    for one in answer.predictions:
        lines.append(_predicted(one))
        warnings += [*one.mean.warnings, *(one.profile.warnings if one.profile else ())]
    if answer.size is not None:
        lines.append(_size(answer.size))
        warnings += answer.size.warnings
    if answer.comparison is not None:
        lines += _compared(answer.comparison)
    if answer.holdout is not None:
        lines += _held_out(answer.holdout)
    lines += [f"warning {code}: {explain(code)}" for code in dict.fromkeys(warnings)]
    if not result.intervals and not answer.profiles:
        lines.append("no intervals: --bootstrap 1000 gives them, or --profile")
    return "\n".join(lines)


def readable_curves(curves: "Curves") -> str:
    """Each curve's answer, and one table of the verdicts together."""
    parts = [f"== {curves.column} = {value}\n{readable(answer)}" for value, answer in curves.answers.items()]
    parts += [f"== {curves.column} = {value}\nnot fitted: {why}" for value, why in curves.failed.items()]
    if curves.together:
        width = max(map(len, curves.together))
        lines = [f"== verdicts of {len(curves.together)} curves judged together (Holm)"]
        for value, verdict in curves.together.items():
            alone = curves.answers[value].result.saturation
            changed = f"   (alone: {alone.verdict})" if alone and alone.verdict != verdict.verdict else ""
            lines.append(f"  {value:<{width}}  {verdict.verdict:<14} {verdict.relative:+.2%} per doubling{changed}")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _parameters(answer: "Answer") -> list[str]:
    result, lines = answer.result, []
    width = max(len(name) for name in result.params)
    for name, value in result.params.items():
        # Where the data leave a parameter open, a number to copy would mislead.
        point = "not identified" if name in result.unidentified else f"{value:.6g}"
        line = f"  {name:<{width}}  {point:>14}"
        low, high = result.intervals.get(name, (value, value))
        if low < high:  # a parameter that is held is the same in every draw
            line += f"   95% {low:.6g} to {high:.6g}"
        if name in answer.profiles:
            line += f"   profile {_ends(answer.profiles[name])}"
        lines.append(line)
    return lines


def _ends(profile: "Profile") -> str:
    low, high = (f"{end:.6g}" if abs(end) != float("inf") else "open" for end in (profile.low, profile.high))
    return f"{profile.level:.0%} {low} to {high}"


def _predicted(one: "Predicted") -> str:
    line = f"at {', '.join(f'{name}={value}' for name, value in one.sizes.items())}: {one.mean.value[0]:.6g}"
    if one.mean.low is not None and one.mean.high is not None and one.run.low is not None and one.run.high is not None:
        line += f"   {INTERVAL:.0%} {one.mean.low[0]:.6g} to {one.mean.high[0]:.6g}"
        line += f", one run {one.run.low[0]:.6g} to {one.run.high[0]:.6g}"
    if one.profile:
        line += f"   profile {_ends(one.profile)}"
    return line


def _size(size: "SaturationSize") -> str:
    if size.size is None:
        return "saturation size: none"
    line = f"saturation size: a doubling gains less than {size.worthwhile:.2%} from N = {size.size:.4g}"
    if size.low is not None and size.high is not None:
        line += f"   {size.interval:.0%} {size.low:.4g} to {size.high:.4g}"
    return line


def _compared(found: "Comparison") -> list[str]:
    width = max(len(score.law) for score in found.laws)
    lines = [f"laws compared, normal noise on the {found.scale} scale:"]
    for score in found.laws:
        aicc, bic = (f"{value:10.2f}" if value is not None else f"{'none':>10}" for value in (score.aicc, score.bic))
        weight = f"{score.weight:.3f}" if score.weight is not None else "none"
        lines.append(f"  {score.law:<{width}}  AICc {aicc}   BIC {bic}   weight {weight}")
    for test in found.tests:
        lines.append(f"  a {test.adds} ({test.small} against {test.large}): p = {test.p:.3g} by {test.draws} bootstrap draws")
    lines += [f"  {one} and {other} are not tested: {why}" for one, other, why in found.not_nested]
    return lines


def _held_out(found: "Holdout") -> list[str]:
    lines = [f"leave largest out, by {found.by}: mean error one size ahead {found.next_error:.2%}"]
    lines[0] += f" ({found.naive_error:.2%} of 'as at the largest fitted size')"
    if found.next_coverage is not None:
        lines[0] += f"; {found.next_coverage:.0%} of the runs in their {found.interval:.0%} interval"
    for row in found.next:
        where = ", ".join(f"{role}={value:.4g}" for role, value in row.sizes.items())
        lines.append(
            f"  {row.fitted} sizes -> {where}: {row.predicted:.6g} predicted, {row.observed:.6g} came ({row.error:+.2%})"
        )
    return lines + [f"  {count} sizes: not fitted: {why}" for count, why in found.failed.items()]
