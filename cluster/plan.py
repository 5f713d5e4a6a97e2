"""From a study to its graph of stages. Stages that several points share are one node."""

import re
from functools import cache
from pathlib import Path
from typing import Any

from cluster import tuning
from cluster.graph import Node, Plan, Point
from cluster.identity import identity
from cluster.rates import Rates, resolve
from cluster.spec import Beams, EncoderSpec, LlmRung, SidRung
from cluster.study import Loaded
from cluster.tuning import Records
from gr.data.dataset import Dataset
from gr.data.split import LeaveOneOut, Temporal
from gr.errors import UserError
from gr.files import sha256
from jobs.config import INTERFACE, STAGES
from jobs.options import Config, Launch

Protocols = LeaveOneOut | Temporal
NO_GPU = frozenset({"plant", "prepare", "baseline", "quantize"})
WEIGHTS = re.compile(r".*\.(json|safetensors|bin|model|txt)$")


def make_plan(loaded: Loaded, records: Records | None = None, priced: bool = False) -> Plan:
    """Resolves a study into its graph; reads the manifest of every data set from outside.

    ``records``: how trials of sweeps ended. A point whose sweep has not ended is pending, or where ``priced`` planned with a
    learning rate that stands for the unknown one, which its ``lr_choice`` says: such a plan is not to be run.
    """
    tuning.check(loaded)
    return _Planner(loaded, records, priced).make()


class _Planner:
    def __init__(self, loaded: Loaded, records: Records | None, priced: bool) -> None:
        self.loaded, self.study = loaded, loaded.study
        self.rates = Rates(records, priced)
        self.plan = Plan(loaded.study)

    def make(self) -> Plan:
        for name, spec in self.study.datasets.items():
            if spec.planted is not None:
                dataset = self.node("plant", {"world": spec.planted.model_dump()}, {})
                planted = True
            else:
                assert spec.path is not None
                dataset = str(self._dataset(name, spec.path).path)
                planted = (Path(dataset) / "world.json").is_file()
            for protocol in self.study.protocols:
                split = self.node("prepare", {"protocol": protocol.model_dump()}, {"dataset": dataset})
                self._cf(name, protocol, dataset, split, planted)
                if self.study.sid:
                    for rung in self.study.sid.ladder:
                        self._sid(name, protocol, split, rung, {"dataset": dataset} if planted else {})
                if self.study.llm:
                    for llm_rung in self.study.llm.ladder:
                        self._llm(name, protocol, split, llm_rung, {"dataset": dataset} if planted else {})
        self.plan.trials = list(self.rates.trials.values())
        return self.plan

    def node(
        self,
        stage: str,
        config: dict[str, Any],
        inputs: dict[str, str],
        processes: int = 1,
        threads: int = 1,
        launch: Launch | None = None,
    ) -> str:
        """Adds a stage, or finds it; returns its id."""
        model: Config = STAGES[stage].model_validate(config)
        dumped = model.model_dump(mode="json")
        identities = {name: value if value in self.plan.nodes else _fingerprint(Path(value)) for name, value in inputs.items()}
        hashed = model.model_dump(exclude={"optimizer": {"lr_choice"}})  # words about a number that is in it
        if hashed.get("model") and Path(hashed["model"]).expanduser().is_dir():
            folder = Path(hashed["model"]).expanduser().resolve()
            dumped["model"] = str(folder)
            identities["model"] = _weights(folder)
            hashed["model"] = None
        beyond = launch.model_dump(exclude={"processes", "threads"}, exclude_defaults=True) if launch else {}
        id = identity(stage, INTERFACE[stage], hashed, identities, processes, beyond)
        no_net = stage in NO_GPU or config.get("tfidf") or config.get("random")
        gpus = 0 if no_net else processes * self.study.resources.gpus_per_process
        self.plan.nodes.setdefault(id, Node(id, stage, dumped, inputs, processes, threads, gpus, beyond))
        return id

    def _dataset(self, name: str, path: Path) -> Dataset:
        try:
            return Dataset(path.expanduser().resolve())
        except UserError as error:
            raise UserError(f"{self.loaded.where(('datasets', name, 'path'))}: datasets.{name}.path: {error}") from None

    def _point(
        self,
        dataset: str,
        protocol: Protocols,
        paradigm: str,
        model: str,
        seed: int,
        nodes: tuple[str, ...],
        widths: tuple[str, ...] = (),
    ) -> None:
        run_id = f"{_group(dataset, protocol, paradigm)}-{model}-s{seed}-{nodes[-1][:8]}"
        self.plan.points.append(Point(run_id, dataset, label(protocol), paradigm, model, seed, nodes, widths))

    def _cf(self, dataset: str, protocol: Protocols, source: str, split: str, planted: bool) -> None:
        methods = list(self.study.cf)
        if planted and "bayes-optimal" not in methods:
            methods.append("bayes-optimal")  # the ceiling of every figure, and it costs seconds
        for method in methods:
            inputs = {"split": split}
            if method == "bayes-optimal":
                if not planted:
                    continue  # of a world that nobody generated the best reachable recall is unknown
                inputs["dataset"] = source
            node = self.node("baseline", {"method": method, **self.study.evaluate.model_dump()}, inputs)
            self._point(dataset, protocol, "cf", method, 0, (node,))

    def _sid(self, dataset: str, protocol: Protocols, split: str, rung: SidRung, world: dict[str, str]) -> None:
        sid = self.study.sid
        assert sid is not None
        group = _group(dataset, protocol, "sid")

        def train(rung: SidRung, optimizer: dict[str, Any], seed: int) -> str:
            return self._train_sid(split, rung, world, optimizer, seed)

        optimizer = self.rates.of(f"{group}-{{}}", sid.train.optimizer, sid.ladder, rung, train)
        for seed in self.study.seeds:
            if optimizer is None:
                self._pending(group, rung.name, seed)
                continue
            trained = train(rung, optimizer, seed)
            node = self.plan.nodes[trained]
            inputs = {"split": split, "sids": node.inputs["sids"], "model": trained}
            evaluate, *widths = self._evaluations("evaluate_sid", sid.evaluate, inputs, node)
            self._point(dataset, protocol, "sid", rung.name, seed, (trained, evaluate), tuple(widths))

    def _evaluations(self, stage: str, spec: Beams, inputs: dict[str, str], trained: Node) -> list[str]:
        """Of a trained model: that of its point, then those with other widths."""
        launch = spec.processes_and_threads(trained.processes, trained.threads)
        configs = [{**self.study.evaluate.model_dump(), **spec.config(beams)} for beams in (spec.beams, *spec.widths)]
        return [self.node(stage, config, inputs, *launch) for config in configs]

    def _train_sid(self, split: str, rung: SidRung, world: dict[str, str], optimizer: dict[str, Any], seed: int) -> str:
        sid = self.study.sid
        assert sid is not None
        sids = self._sids(split, rung.encoder, rung.quantizer, world)
        config = {
            "size": rung.model_dump(include={"layers", "d_model", "heads", "d_kv", "d_ff"}),
            **sid.train.model_dump(exclude={"optimizer"}),
            "optimizer": optimizer,
            "seed": seed,
        }
        launch = self._launch(rung)
        return self.node("train_sid", config, {"split": split, "sids": sids}, launch.processes, launch.threads, launch)

    def _sids(self, split: str, encoder: str | None, quantizer: str | None, world: dict[str, str]) -> str:
        """The items' SIDs by an encoder and a quantizer of the study's ``sid``, the first ones where none is named."""
        sid = self.study.sid
        assert sid is not None
        embeddings = self._embeddings(split, sid.encoders[encoder or next(iter(sid.encoders))])
        config = sid.quantizers[quantizer or next(iter(sid.quantizers))].model_dump()
        return self.node("quantize", config, {"embeddings": embeddings, **world})

    def _embeddings(self, split: str, spec: EncoderSpec) -> str:
        inputs = {"split": split}
        if spec.fresh:
            config = {
                "size": spec.fresh.model_dump(include={"layers", "d_model", "heads", "d_ff"}),
                "vocab": spec.fresh.vocab,
                "max_tokens": spec.fresh.max_tokens,
                "optimizer": resolve(spec.fresh.optimizer, spec.fresh.d_model),
            }
            inputs["encoder"] = self.node("train_encoder", config, {"split": split})
        config = spec.model_dump(exclude={"fresh", "launch"})
        return self.node("encode", config, inputs, spec.launch.processes, spec.launch.threads)

    def _llm(self, dataset: str, protocol: Protocols, split: str, rung: LlmRung, world: dict[str, str]) -> None:
        llm = self.study.llm
        assert llm is not None
        group = _group(dataset, protocol, "llm")
        fresh = [other for other in llm.ladder if other.model is None]

        def pretrain(rung: LlmRung, optimizer: dict[str, Any], seed: int) -> str:
            return self._fresh_backbone(split, rung, optimizer, seed)

        def train(rung: LlmRung, optimizer: dict[str, Any], seed: int) -> str | None:
            inputs = {"split": split}
            if llm.train.input != "titles":
                inputs["sids"] = self._sids(split, llm.train.encoder, llm.train.quantizer, world)
            if rung.model is None:
                assert llm.pretrain is not None
                pretraining = self.rates.of(f"{group}-{{}}-pretrain", llm.pretrain.optimizer, fresh, rung, pretrain, own=False)
                if pretraining is None:
                    return None
                inputs["backbone"] = pretrain(rung, pretraining, seed)
            return self._train_llm(inputs, rung, optimizer, seed)

        optimizer = self.rates.of(f"{group}-{{}}", llm.train.optimizer, llm.ladder, rung, train)
        for seed in self.study.seeds:
            trained = train(rung, optimizer, seed) if optimizer is not None else None
            if trained is None:
                self._pending(group, rung.name, seed)
                continue
            node = self.plan.nodes[trained]
            evaluate, *widths = self._evaluations("evaluate_llm", llm.evaluate, {**node.inputs, "model": trained}, node)
            self._point(dataset, protocol, "llm", rung.name, seed, (trained, evaluate), tuple(widths))

    def _train_llm(self, inputs: dict[str, str], rung: LlmRung, optimizer: dict[str, Any], seed: int) -> str:
        assert self.study.llm is not None
        config = {
            **self.study.llm.train.model_dump(exclude={"optimizer", "encoder", "quantizer"}),
            "model": rung.model,
            "optimizer": optimizer,
            "seed": seed,
        }
        launch = self._launch(rung)
        return self.node("train_llm", config, inputs, launch.processes, launch.threads, launch)

    def _launch(self, rung: SidRung | LlmRung) -> Launch:
        if isinstance(rung.launch, Launch):
            return rung.launch
        from cluster.auto import launch_of  # counts on the modules, and imports torch

        return launch_of(self.loaded, rung)

    def _fresh_backbone(self, split: str, rung: LlmRung, optimizer: dict[str, Any], seed: int) -> str:
        """One per seed: backbones differ between rungs, so seeds that shared theirs would vary less than the rungs do."""
        assert self.study.llm is not None and self.study.llm.pretrain is not None
        config = {
            "size": rung.model_dump(include={"layers", "d_model", "heads", "d_ff", "kv_heads"}),
            **self.study.llm.pretrain.model_dump(exclude={"optimizer"}),
            "optimizer": optimizer,
            "seed": seed,
        }
        launch = self._launch(rung)
        return self.node("pretrain_llm", config, {"split": split}, launch.processes, launch.threads, launch)

    def _pending(self, group: str, model: str, seed: int) -> None:
        self.plan.pending[f"{group}-{model}-s{seed}"] = group


def _group(dataset: str, protocol: Protocols, paradigm: str) -> str:
    return f"{dataset}-{'loo' if protocol.kind == 'leave-one-out' else label(protocol)}-{paradigm}"


def label(protocol: Protocols) -> str:
    """The protocol column: its kind, with the fractions where they are not the default ones."""
    if isinstance(protocol, Temporal) and protocol != Temporal():
        return f"temporal-{protocol.val:g}-{protocol.test:g}"
    return protocol.kind


def _fingerprint(folder: Path) -> str:
    return f"dataset:{Dataset(folder).fingerprint}"


def _weights(folder: Path) -> str:
    """Fingerprint of a model folder: name, size and checksum of each of its files."""
    parts = []
    for file in sorted(path for path in folder.iterdir() if path.is_file() and WEIGHTS.match(path.name)):
        stat = file.stat()
        parts.append(f"{file.name}:{stat.st_size}:{_checksum(file, stat.st_mtime_ns, stat.st_size)}")
    return "model:" + ";".join(parts)


@cache
def _checksum(file: Path, mtime_ns: int, size: int) -> str:  # noqa: ARG001 -- they tell another content of the same file
    """Read once in a process: every seed and rung of a study asks again, and large weights take seconds."""
    return sha256(file)
