"""What each coded warning means, in a sentence."""

_WORDS = {
    "dead": "{} contributes nothing over the fitted sizes: under a thousandth of the metric's range.",
    "log-linear": "The power term {} is a logarithm in disguise over these sizes: exponent and coefficient mean nothing apart.",
    "constant": "{} does not vary in this table, so nothing can be learnt of its part.",
    "collinear": "The sizes {} vary together, so their parts cannot be told from each other.",
    "unidentified": "The data do not pin down {}; do not quote it as a number.",
    "bound": "{} ended at the edge of its allowed range.",
    "start": "Of the starting points of the search {} reached the best fit, so another fit of the same quality may exist.",
    "not-optimal": "The search stopped before an optimum (scaled gradient {}).",
    "no-spare-sizes": "As many parameters as sizes ({}): the law runs through the points and cannot be checked.",
    "seeds": "One seed only: the intervals come from the scatter about the law, not from repeated runs.",
    "perfect": "The law runs through every point exactly; measured data hardly ever do that.",
    "percent": "{} is above 1: percentages? The fit is unaffected, but a recall is usually written 0 to 1.",
    "extrapolates": "The farthest prediction lies {} beyond the sizes that were fitted.",
    "identical-seeds": "Repeated runs of {} gave exactly the same metric; were they the same run?",
    "lack-of-fit": "The largest sizes do not lie on a line within their seeds' noise (p = {}): either the curve bends there, "
    "or sizes differ by what their seeds share.",
    "narrow": "The largest sizes span only {}.",
    "holm": "The verdict was judged together with those of {} curves in all (Holm); its interval is of this curve alone.",
    "law-misfit": "The law does not describe the sizes within their seeds' noise (p = {}), so no saturation size is read off it.",
    "law-untested": "Whether {} describes the sizes cannot be tested (no repeated runs, or as many parameters as sizes), so no "
    "saturation size is read off it.",
    "from-start": "By this law a doubling is not worth it at any fitted size; the saturation size is at or below the smallest.",
    "beyond": "By this law a doubling is still worth it {} beyond the largest fitted size.",
    "no-optimum": "In {} of the draws one of the law's terms is nothing, so that no split of compute is optimal.",
    "crossings": "The two curves cross {} times within reach; the last crossing is given, from which on the winner stays ahead.",
    "open": "The profile of {} has no end on one side: the data do not limit it there.",
    "better-elsewhere": "On the way along {} there is a better fit than the one that was found; the search missed it.",
    "no-draws": "No interval: it needs the draws of a bootstrap.",
}


def explain(warning: str) -> str:
    """A sentence for a coded warning such as ``unidentified:A,a``; an unknown code is returned as it is."""
    code, _, what = warning.partition(":")
    if code in ("one", "other"):  # of two laws that were compared
        return f"The {'first' if code == 'one' else 'second'} law: {explain(what)}"
    return _WORDS[code].format(what.replace(",", ", ")) if code in _WORDS else warning
