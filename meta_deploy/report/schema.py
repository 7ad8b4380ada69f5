"""What a report holds, and so the schema of its JSON, stated here and nowhere else.

Knows names and units, and neither how a number is measured nor how it is shown. Times are in milliseconds of
one image (of one run, where the input is arrays), memory in MB of 10^6 bytes, sizes of files in bytes.
"""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

import msgspec
from msgspec import Struct

from meta_deploy.bundle.manifest import PassRow

SCHEMA = 1
Verdict: TypeAlias = Literal["faster", "slower", "no difference"]
PARTS = ("pre", "model", "post", "total")
OperatorClass: TypeAlias = Literal[
    "convolution",
    "matrix product",
    "attention",
    "normalization",
    "element-wise",
    "data movement",
    "resize",
    "post-processing",
    "other",
    "between nodes",
]
CLASSES: tuple[OperatorClass, ...] = get_args(OperatorClass)


class Spread(Struct, frozen=True, kw_only=True):
    """How a time is spread over the rounds."""

    median: float
    p5: float
    p90: float
    p99: float


class Ratio(Struct, frozen=True, kw_only=True):
    """A time relative to the first entry's: the median over the rounds of both times of one round.

    `low` and `high` are its confidence interval, 99 %, by a bootstrap over blocks of rounds.
    """

    value: float
    low: float
    high: float
    verdict: Verdict


class Latency(Struct, frozen=True, kw_only=True):
    """Preprocessing (decoding apart), the model and postprocessing of one image, and their sum.

    Attributes:
        rounds: timed runs; each round runs every entry once.
        total_ratio, model_ratio: to the first entry that ran; None for that one.
        drift: the model's median time in the last third of the rounds over that in the first third.
    """

    rounds: int
    pre: Spread
    model: Spread
    post: Spread
    total: Spread
    total_ratio: Ratio | None
    model_ratio: Ratio | None
    drift: float


class GpuTime(Struct, frozen=True, kw_only=True):
    """What a run of the model takes on the GPU, by CUDA's events, over the same rounds as `Latency.model`.

    Attributes:
        compute: between the copies; to_device, to_host: these.
        memory_mb: of the GPU, that became less free from opening the model to the end of the rounds.
    """

    to_device: Spread
    compute: Spread
    to_host: Spread
    memory_mb: float


class Throughput(Struct, frozen=True, kw_only=True):
    """Images a second at one batch size, pre- and postprocessing included; None where `reason` says why.

    `ms` is a batch's time, `images_per_second` by its median.
    """

    batch: int
    images_per_second: float | None = None
    ms: Spread | None = None
    reason: str | None = None


class Cost(Struct, frozen=True, kw_only=True):
    """What operators have to do by the shapes that they ran on; None where shapes do not tell.

    `bytes_read` and `bytes_written` go by the tensors, each once, as if no cache held them. `flops` counts a
    multiplication and an addition as two.
    """

    bytes_read: int | None
    bytes_written: int | None
    flops: int | None


class NodeRow(Cost, frozen=True, kw_only=True):
    """A node of the graph as the back end runs it, which fuses and adds nodes, with its time in one run.

    Attributes:
        op: its operator, the back end's own included.
        module: of PyTorch, that it came from; empty where that is not known.
        calls: in one run; not 1 for nodes in loops and branches.
        inputs, outputs: types and shapes, such as "float 1x3x64x64".
        intensity: FLOPs a byte read or written.
        bound: by memory or by arithmetic, on this machine's roofline.
        share_of_roof: the least time that this machine could take for its bytes and FLOPs, over its time.
    """

    name: str
    op: str
    op_class: OperatorClass
    calls: float
    ms: float
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    intensity: float | None = None
    bound: Literal["memory", "arithmetic"] | None = None
    share_of_roof: float | None = None
    module: str = ""


class ModuleRow(Struct, frozen=True, kw_only=True):
    """All nodes of a PyTorch module and of those in it; by the name "", all nodes of which none is known.

    Bytes and FLOPs are of nodes that tell theirs.
    """

    name: str
    nodes: int
    ms: float
    share: float
    bytes_read: int
    bytes_written: int
    flops: int


class ClassRow(Struct, frozen=True, kw_only=True):
    """All nodes of a class: times add up to `Profile.ms`; bytes and FLOPs are of nodes that tell theirs."""

    name: OperatorClass
    nodes: int
    ms: float
    share: float
    bytes_read: int
    bytes_written: int
    flops: int


class LiveTensor(Struct, frozen=True, kw_only=True):
    """A tensor that is alive at the peak, and the node that made it ("input" for the graph's inputs)."""

    name: str
    made_by: str
    bytes: int


class LivePeak(Struct, frozen=True, kw_only=True):
    """The most bytes of activations that are alive at once, by shapes and the order in which nodes run.

    A tensor lives from the node that makes it to the last that reads it; weights are not counted.
    """

    bytes: int
    node: str
    tensors: tuple[LiveTensor, ...]


class Profile(Struct, frozen=True, kw_only=True):
    """Where a run of the model goes: means over `runs` runs under the back end's profiler.

    Attributes:
        by: whose profiler.
        ms: a run, under the profiler, which slows it down a little.
        classes: by falling time; the class "between nodes" is what is left of a run.
        nodes: in the order in which they run.
        modules: by name, those within others too; none where no node tells its module.
    """

    by: str
    runs: int
    ms: float
    classes: tuple[ClassRow, ...]
    nodes: tuple[NodeRow, ...]
    live_peak: LivePeak | None = None
    modules: tuple[ModuleRow, ...] = ()


class PassProfile(Struct, frozen=True, kw_only=True):
    """Where a run goes after a graph pass, on ONNX Runtime's CPU; by the name "", before the first.

    `ms` and `classes` are as in `Profile`; a pass without changes has those of the row before it.
    """

    name: str
    changes: int
    ms: float
    classes: tuple[ClassRow, ...]


class Roofline(Struct, frozen=True, kw_only=True):
    """What this machine does at best with the given threads: a copy, and a float32 matrix product."""

    bandwidth_gb_s: float
    peak_gflop_s: float


class LayerRow(Struct, frozen=True, kw_only=True):
    """A layer of an engine: a kernel that is started, with what of the graph is computed in it.

    Attributes:
        kind: TensorRT's LayerType, such as kgen (a generated kernel), gemm or correlation (a convolution).
        kernel: its name without the number after it; empty where a library's kernel is chosen at run time.
        type: of its first output, such as fp16.
        reformat: it moves or converts elements and no node of the graph asks for that.
        inputs, outputs: types and shapes, such as "fp16 1x64x64x64"; weights are not among them.
        bytes_read, bytes_written: of its tensors and weights, each once; None where a size is open.
        nodes: of the graph, by name; modules: of PyTorch, that these came from.
    """

    name: str
    kind: str
    kernel: str
    type: str
    op_class: OperatorClass
    reformat: bool
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    bytes_read: int | None
    bytes_written: int | None
    nodes: tuple[str, ...]
    modules: tuple[str, ...]


class AttentionRow(Struct, frozen=True, kw_only=True):
    """An attention of the graph, by its softmax, and whether an engine has it in one kernel.

    Attributes:
        reason: why it is not fused, by what is known of TensorRT's conditions; None where it is.
        layers: that its products and softmax are in.
    """

    node: str
    module: str
    fused: bool
    reason: str | None
    layers: tuple[str, ...]


class EngineRow(Struct, frozen=True, kw_only=True):
    """What a TensorRT engine consists of, as its build told. What is not known is None.

    Attributes:
        gpu: the one GPU model that it is for; compute_capabilities: that it is for; neither: all that the
            library knows.
        layers: in their order; `no_layers` says why there are none.
        kinds: layers of each kind, by type.
        generated_kernels: made for this graph, of element-wise and moving operators; reformats: see
            `LayerRow`.
        attentions: of the graph; empty where the graph or the layers are not known.
        activation_mb, weights_mb: memory on the GPU; plan_mb: of the file; seconds: the build took.
    """

    library: str | None = None
    version: str | None = None
    gpu: str | None = None
    compute_capabilities: tuple[str, ...] = ()
    layer_count: int | None = None
    generated_kernels: int | None = None
    reformats: int | None = None
    fused_attentions: int | None = None
    attention_count: int | None = None
    kinds: dict[str, dict[str, int]] = {}
    activation_mb: float | None = None
    weights_mb: float | None = None
    plan_mb: float | None = None
    seconds: float | None = None
    layers: tuple[LayerRow, ...] = ()
    no_layers: str | None = None
    attentions: tuple[AttentionRow, ...] = ()


class Accuracy(Struct, frozen=True, kw_only=True):
    """How good an entry's results are, or how near to the first entry's. What does not apply is None.

    Attributes:
        against: what its results are held against. Without annotations these are the first entry's: of its
            detections those of a score of at least 0.3.
        images: how many were looked at; runs, where the input is arrays.
        box_ap, box_ap50, mask_ap, mask_ap50: COCO's average precision, 0 to 1, at IoU 0.5 to 0.95 and 0.5.
        mean_iou: over the classes that occur; pixel_accuracy: the share of pixels of the right class.
        max_relative_error: of arrays, the largest difference over the largest value, over all outputs;
            not finite where an output is absent or of another shape.
        mean_score_difference, max_score_difference: of detections that the first entry has too (score at
            least 0.3, one class, IoU at least 0.5), also where there are annotations.
        logit_error: of class maps, the norm of the difference of the logits from the first entry's over
            their norm, on the worst of the first eight images; also where there are annotations.
    """

    against: Literal["annotations", "the first entry"]
    images: int
    box_ap: float | None = None
    box_ap50: float | None = None
    mask_ap: float | None = None
    mask_ap50: float | None = None
    mean_iou: float | None = None
    pixel_accuracy: float | None = None
    max_relative_error: float | None = None
    mean_score_difference: float | None = None
    max_score_difference: float | None = None
    logit_error: float | None = None


class Entry(Struct, frozen=True, kw_only=True):
    """One thing that was compared, on one back end.

    Attributes:
        name: the shortest that tells it from the others.
        kind: what `path` is; None where it is no model.
        backend: what ran it; what was asked for, where it failed.
        error: why there is nothing more to tell of it; None where all went well.
        not_timed: why an engine has no latency here, such as "no GPU here"; what is known of it stands in
            `engine`.
        runs_on: library, version, device and precision in words.
        files: name -> bytes.
        gpu: of engines on a GPU.
        throughput: at each batch size that was asked for.
        passes: of a bundle, what each graph pass did when it was exported, from the manifest.
        peak_memory_mb: the most memory that its own process held, from its start to the end of the timed
            rounds; None where the system does not tell.
        accuracy: None for the first entry without annotations, and for what cannot be compared.
        profile: where the model's time goes; None where `no_profile` says why.
        pass_profiles: of a checkpoint or an .onnx file, where that was asked for; else, `no_pass_profiles`
            says why there are none.
        engine: what the engine consists of, of bundles for TensorRT and of engines' files.
    """

    name: str
    path: str
    kind: Literal["bundle", "onnx", "checkpoint", "engine"] | None
    backend: str
    error: str | None = None
    not_timed: str | None = None
    runs_on: str | None = None
    model: str | None = None
    task: str | None = None
    precision: str | None = None
    files: dict[str, int] = {}
    passes: tuple[PassRow, ...] = ()
    latency: Latency | None = None
    gpu: GpuTime | None = None
    throughput: tuple[Throughput, ...] = ()
    peak_memory_mb: float | None = None
    accuracy: Accuracy | None = None
    profile: Profile | None = None
    no_profile: str | None = None
    pass_profiles: tuple[PassProfile, ...] = ()
    no_pass_profiles: str | None = None
    engine: EngineRow | None = None


class Machine(Struct, frozen=True, kw_only=True):
    """What the numbers were measured on and with. `load` is the load average before the first run.

    `gpus` are those that NVIDIA's driver tells of.
    """

    cpu: str
    instruction_sets: tuple[str, ...]
    cpus: int
    memory_gb: float | None
    governor: str | None
    system: str
    versions: dict[str, str]
    load: float | None
    gpus: tuple[str, ...] = ()


class Settings(Struct, frozen=True, kw_only=True):
    """How it was measured.

    `images` is what was run on; entries that take arrays get random ones, the same for all. `annotations` is
    the file or folder that results are held against, `batches` the sizes that throughput was asked for at.
    """

    images: tuple[str, ...]
    annotations: str | None = None
    batches: tuple[int, ...] = ()
    by_pass: bool = False
    warm_up: int
    runs: int
    threads: int


class Disagreement(Struct, frozen=True, kw_only=True):
    """An image on which an entry differs from the first one.

    Attributes:
        values: entry -> how far its result is from the first entry's, 0 to 1: of detections of a score of at
            least 0.3 the share that has no partner (1 - TP / (TP + FP + FN), IoU at least 0.5), of class maps
            the share of pixels of another class.
        overlays: entry -> its result drawn on the image, a JPEG; in JSON as base64.
    """

    image: str
    values: dict[str, float]
    overlays: dict[str, bytes]


class Gate(Struct, frozen=True, kw_only=True):
    """A condition of `--fail-if`, held against the entries.

    Attributes:
        condition: such as "latency_ratio > 1.05".
        values: what counts of each entry that has it, by the entry's name.
        failed: the entries that fulfil the condition.
        passed: false too where no entry has a value.
    """

    condition: str
    values: dict[str, float]
    failed: tuple[str, ...]
    passed: bool


class Change(Struct, frozen=True, kw_only=True):
    """A metric of one entry in the baseline, and in this report."""

    then: float
    now: float


class Baseline(Struct, frozen=True, kw_only=True):
    """An earlier report on the same machine, and what has changed since.

    Attributes:
        date: of the earlier report.
        disturbed: whether that was.
        versions: packages of other versions: then and now, null where there was none.
        changes: entry -> metric, as `--fail-if` names them -> values; entries of the same name.
    """

    path: str
    date: str
    disturbed: bool
    versions: dict[str, tuple[str | None, str | None]]
    changes: dict[str, dict[str, Change]]


class Report(Struct, frozen=True, kw_only=True):
    """All that `meta-report` found.

    `disturbances` say in a sentence each why the times are not to be trusted; none: nothing was noticed.
    `disagreements` are the images with most of it, the worst first.
    """

    schema: int = SCHEMA
    date: str
    command: str
    machine: Machine
    settings: Settings
    disturbances: tuple[str, ...] = ()
    roofline: Roofline | None = None
    baseline: Baseline | None = None
    gates: tuple[Gate, ...] = ()
    disagreements: tuple[Disagreement, ...] = ()
    entries: tuple[Entry, ...]

    def to_json(self) -> str:
        """The JSON document, in one line. What is not a finite number is null."""
        return msgspec.json.encode(self).decode() + "\n"
