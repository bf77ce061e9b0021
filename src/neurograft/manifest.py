"""What an organ says of itself, and what a transplant says of the model that it made: the JSON schemas."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

SCHEMA_VERSION = 2
RECORD_FILE = "neurograft.json"
UNSEALED = "0" * 64
"""What stands for a digest that is not made yet."""

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0)]
Mode = Literal["replace", "insert"]
Verify = Literal["written", "bytes", "layers"]
"""How much a result is checked, each level on top of the one before; docs/disk.md says what each proves."""
Protocol = Literal["in_place", "insert", "standalone"]
Scope = Literal["organ", "neighbours", "seams"]
MergeMethod = Literal["average", "ties", "dare"]
Unfreeze = Literal["at_once", "gradual"]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,95}$")]
VERSION_PATTERN = r"^\d+\.\d+\.\d+([-+][0-9A-Za-z.+-]+)?$"
# A record may come from anywhere, and what it names is read and copied: nothing outside the folder of explants.
ExplantPath = Annotated[str, Field(pattern=r"^explants/[A-Za-z0-9][A-Za-z0-9._-]*\.safetensors$")]


class _Part(BaseModel):
    """Immutable; a key that the schema does not know is an error, so that a typo can't pass."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, defer_build=True)


class LayerAnatomy(_Part):
    """Everything in the donor's configuration that the arithmetic of its layers depends on."""

    model_type: str
    """transformers' name of the architecture, such as `llama`."""
    config: dict[str, Any]
    """The whole configuration of the model that the layers stood in, as transformers writes it, lists explicit."""
    first_layer: Count
    """Number of the organ's first layer in the model that `config` describes."""
    layer_values: list[dict[str, Any]]
    """For each of the k layers, its row of the per-layer configuration values, such as `layer_types`."""
    dtype: str
    """The dtype of the organ's floating-point tensors, `float32` or the like; `mixed` if they differ."""


class TokenizerFingerprint(_Part):
    """Enough of a tokenizer to tell whether another one maps text to the same tokens."""

    vocabulary_size: Count
    vocabulary_digest: Digest
    """SHA-256 over all (token, id) pairs."""
    sample_digest: Digest
    """SHA-256 over the token ids of a fixed sample text."""


class Source(_Part):
    """Where an organ's layers came from."""

    model: str
    """Hub id, or the last part of a local path; never a full path, which may say more than its owner wants."""
    revision: str | None = None
    layer_start: Count
    """First layer, zero-based; the range is half-open."""
    layer_stop: Count
    layer_count: Count
    """How many layers the donor has."""
    layer_digests: list[Digest]
    """For each of the k layers, the digest of its tensors as extracted, before any training."""
    dequantised_from: str | None = None
    """What the layers were stored as where these tensors were computed from packed ones, such as `GGUF Q4_1`."""


class Redaction(_Part):
    """What was found and masked in the training text, and by what; no text."""

    counts: dict[str, Count] | None
    """How often each kind of personal data was masked, such as `EMAIL_ADDRESS`; `None` after a private training, which
    keeps such counts to itself."""
    documents: Count | None
    """Documents in which something was masked; `None` likewise."""
    recognizers: list[str]
    """What looked for it. Names of people and places are looked for only where `names_by` says how."""
    names_by: str | None
    """Language model that looked for names; `None` if none was installed, and names stand as they were."""
    versions: dict[str, str]


class Privacy(_Part):
    """The differential privacy of a training, under adding or removing one unit (DP-SGD, arXiv 1607.00133)."""

    epsilon: float
    """What was spent in all steps, as the accountant computes it."""
    delta: float
    unit: Literal["document"] = "document"
    """What is protected: any one document, whole, as far as it was trained on."""
    units: Count
    """How many there were; taken to be public."""
    noise_multiplier: float
    """Standard deviation of the noise over the norm that gradients are cut to."""
    sample_rate: float
    """Chance of each document to be in a step, independent of the others."""
    clip: float
    """The norm that the gradient of each document is cut to."""
    steps: Count
    accountant: Literal["prv", "rdp"]
    """Numerical composition (arXiv 2106.02848), or Renyi divergences (arXiv 1908.10530)."""


class Training(_Part):
    """How an organ was trained; counts and digests only, no text."""

    protocol: Protocol | Literal["recovery"]
    position: Count
    """How many host layers stood before the organ while it trained."""
    host: str
    data_fingerprint: Digest | None
    """`None` after a private training: a guess at all of the text could be confirmed by it."""
    documents: Count
    tokens_seen: Count
    """After a private training not what was seen, but steps x documents expected in each x sequence length."""
    steps: Count
    hyperparameters: dict[str, Any]
    seed: int
    versions: dict[str, str]
    seconds: float
    loss_history: list[tuple[int, float]]
    """(optimizer step, mean training loss in nats per token since the last entry); empty after a private training."""
    redaction: Redaction | None = None
    """What was masked in the text before; `None` if nobody looked. Absent in schema 1."""
    privacy: Privacy | None = None
    """How private it was; `None` if it was not. Absent in schema 1."""


class Evaluation(_Part):
    """Perplexity on one data set before and after training."""

    data: str
    documents: Count
    tokens: Count
    before: float
    after: float


class ScanPoint(_Part):
    """What a scan measured with the organ at one place."""

    mode: Mode
    position: Count
    tokens: Count
    """Tokens scored there; fewer than of the whole sample where the place was dropped on the way."""
    perplexity: float
    ratio: float
    """Perplexity over that of the recipient alone on the same text."""
    low: float
    """Limits of the 95 % interval of the ratio."""
    high: float
    apart: bool
    """Whether the place can be told apart from the best one."""
    general_ratio: float | None = None
    """The same ratio on other text, if there was any."""


class Scan(_Part):
    """A scan of the places where the organ could go in one recipient."""

    recipient: str
    layer_count: Count
    """How many layers the recipient has."""
    mode: Mode
    """The best place's."""
    position: Count
    """The best place's, in this recipient."""
    data_fingerprint: Digest
    documents: Count
    tokens: Count
    """Tokens scored at the best place."""
    recipient_perplexity: float
    """Of the recipient alone, on the same tokens."""
    recover_tokens: Count
    """Tokens that the organ was trained on at each place before it was measured; 0 for none."""
    points: list[ScanPoint]
    seed: int
    versions: dict[str, str]
    when: str


class MembershipFigures(_Part):
    """How well one attack tells documents that were trained on from others."""

    attack: str
    auc: float
    """Area under the ROC curve: 0.5 where nothing is given away, 1 where everything is."""
    auc_low: float
    auc_high: float
    """Limits of the 95 % interval, by bootstrap over documents."""
    true_positives: float
    """Share of the members that are found at 1 % false positives; 0.01 where nothing is given away."""
    true_positives_low: float
    true_positives_high: float
    host_auc: float | None
    """The same attack's on the host without the organ: what is not near 0.5 is no memory of the organ's, but a
    difference between the two texts. `None` for attacks that look at both already."""


class ExtractionFigures(_Part):
    """How many documents are recited word for word, by greedy decoding after a prefix."""

    text: Literal["members", "non-members"]
    prefix: Count
    """Tokens that were given, at least."""
    length: Count
    """Tokens in a row that had to be recited."""
    documents: Count
    """Documents that were long enough to be asked for."""
    recited: Count
    """How many of them were recited with the organ."""
    recited_low: float
    recited_high: float
    """Limits of the 95 % interval of their share (Wilson)."""
    recited_by_host: Count
    """How many of them the host alone recites."""
    longest: Count
    """Most tokens in a row that were recited with the organ."""
    longest_by_host: Count


class CanaryFigures(_Part):
    """How well planted sentences are remembered, and which epsilon that refutes."""

    canaries: Count
    included: Count
    """How many of them, by a coin for each, were trained on."""
    repeats: Count
    """How many times each; with more than 1, epsilon is that of a group of so many records."""
    tokens: Count
    """Tokens of all canaries."""
    exposure_mean: float
    exposure_median: float
    exposure_most: float
    """In bits, over the included ones (arXiv 1802.08232)."""
    exposure_limit: float
    """The most that could be seen with so many canaries."""
    guesses: Count
    correct: Count
    """How many canaries were guessed to be included or not, and how many of these guesses were right."""
    epsilon: float
    """The training was no more private than this, under adding or removing one record (arXiv 2305.08846,
    appendix D); 0 says that nothing was shown."""
    delta: float
    confidence: float


class Audit(_Part):
    """Attacks on an organ by someone who has it, the host and candidates for its training text."""

    host: str
    mode: Mode
    position: Count
    sequence_length: Count
    members: Count
    non_members: Count
    """Documents that were trained on, and documents that were not."""
    member_tokens: Count
    non_member_tokens: Count
    members_verified: bool
    """Whether the members have the fingerprint of a training in the manifest; otherwise they are somebody's word."""
    membership: list[MembershipFigures]
    extraction: list[ExtractionFigures]
    canaries: CanaryFigures | None
    seed: int
    versions: dict[str, str]
    when: str


class Probe(_Part):
    """What each layer answers to a fixed random hidden state: the layer's arithmetic, measured.

    A recipient that computes an organ's layers in any other way (another rotary base, window, scale, index) is
    caught by asking it the same.
    """

    seed: int
    tokens: Count
    """T: positions in the probe."""
    values: list[list[list[float]]]
    """k layers x T positions x signed sums of the output's features."""
    dtype: str


class Sketch(_Part):
    """The hidden states that entered and left an organ where it was trained, projected to a few numbers.

    They are those on a public text; nothing here is of the text that the organ was trained on.
    """

    text: Digest
    """SHA-256 of the public text."""
    seed: int
    """Of the fixed random directions on which states are projected."""
    window: Annotated[int, Field(ge=1)]
    """Tokens in a piece of the text."""
    tokens: Count
    """N: tokens whose states are here."""
    width: Annotated[int, Field(ge=1, le=1024)]
    """r: directions."""
    entering: Annotated[str, Field(max_length=400_000)]
    """(N, r) float16, little-endian, in base64: states scaled to a root mean square of 1, then projected."""
    leaving: Annotated[str, Field(max_length=400_000)]


class Parent(_Part):
    """One of the organs that an organ was merged from."""

    name: Name
    version: str
    tensors_digest: Digest
    """SHA-256 over the parent's tensors."""
    file_digest: Digest | None
    """That of its file; `None` if it never was in one."""
    weight: Annotated[float, Field(ge=0, le=1)]
    """How much it counted; the weights of all parents add up to 1."""


class Merge(_Part):
    """How an organ was merged from others."""

    method: MergeMethod
    parents: Annotated[list[Parent], Field(min_length=2)]
    base: str | None = None
    """Name of the model whose layers the task vectors were taken from; `None` for `average`, which has none."""
    density: float | None = None
    """Share of each task vector that was kept."""
    scale: float | None = None
    """What the merged task vector was multiplied by."""
    seed: Count | None = None
    """Of what `dare` dropped."""


class Manifest(_Part):
    """The manifest of an organ, stored as JSON in the file's header under the key `neurograft`."""

    schema_version: Annotated[int, Field(ge=1)] = SCHEMA_VERSION
    name: Name
    version: Annotated[str, Field(pattern=VERSION_PATTERN)] = "0.1.0"
    """Semantic version of the organ."""
    license: str | None = None
    description: str | None = None
    created: str
    """UTC, ISO 8601."""
    kind: Literal["organ", "explant"] = "organ"
    anatomy: LayerAnatomy
    tokenizer: TokenizerFingerprint | None = None
    source: Source
    training: Training | None = None
    """The last training."""
    training_history: list[Training] = []
    """The trainings before it, first to last; absent in schema 1."""
    evaluations: list[Evaluation] = []
    scans: list[Scan] = []
    """Scans of the places where it could go, first to last; absent in schema 1."""
    audits: list[Audit] = []
    """What attacks found out about its training text, first to last; absent in schema 1."""
    merged: Merge | None = None
    """The merge that the organ came from, if it did; what is in `training` came after it. Absent in schema 1."""
    recommended_mode: Mode
    recommended_position: Count
    probe: Probe | None = None
    """`None` where the layers were not asked: extracted as bytes, never run."""
    sketch: Sketch | None = None
    """`None` for what was not trained, or was merged since. Absent in schema 1."""
    tensors_digest: Digest
    """SHA-256 over names, dtypes, shapes and bytes of the tensors."""
    file_digest: Digest
    """SHA-256 over the whole file with the 64 digits of this field written as zeros."""

    @property
    def layer_count(self) -> int:
        """k: how many layers the organ has."""
        return len(self.anatomy.layer_values)

    @property
    def trainings(self) -> list[Training]:
        """Every training of the organ, first to last."""
        return [*self.training_history, *([self.training] if self.training else [])]

    def merge_line(self) -> str | None:
        """Say in one line what the organ was merged from; `None` if it was not."""
        if self.merged is None:
            return None
        parents = (f"{parent.name} {parent.version} ({parent.weight:.0%})" for parent in self.merged.parents)
        return f"by {self.merged.method} from {', '.join(parents)}"

    @property
    def is_packed(self) -> bool:
        """Whether the layers are quantised: bytes that mean something only to the method that packed them."""
        return bool(self.anatomy.config.get("quantization_config"))


class Origin(_Part):
    """Where one layer of a transplanted model came from."""

    organ: str | None
    """Name of the organ; `None` for a layer of the original recipient."""
    layer: Count
    """Zero-based layer number inside the organ, or inside the original recipient."""
    digest: Digest | None
    """Digest of the layer's tensors as they are in this model; `None` if they were linked and never read."""


class ExplantLayer(_Part):
    """One layer in one of the explants beside a model."""

    path: ExplantPath
    """Relative to the model directory."""
    layer: Count


class Operation(_Part):
    """One transplant."""

    organ: Name
    organ_version: str
    organ_file_digest: Digest
    mode: Mode
    position: Count
    explant: ExplantPath | None
    """Path, relative to the model directory, of the organ file that holds what `replace` took out; `None` after
    `insert`, or if nothing in that file is needed any more."""
    explant_origins: list[Origin | None]
    """Where the layers came from in whose places the organ's stand, one after the other; `None` where there is nothing
    to put back, because an inserted organ that had stood there is gone."""
    explant_places: list[ExplantLayer | None] = []
    """Which layer of which explant each of them is; left empty where they are those of `explant`, in order. Absent in
    schema 1."""
    manifest: Manifest | None = None
    """The organ's manifest as it was put in; absent in schema 1."""
    verified: Verify = "layers"
    """How the result was checked: every byte written, also what was linked, also what each layer computes."""
    when: str

    @property
    def replaced(self) -> list[tuple[Origin, ExplantLayer] | None]:
        """What stood in the place of each of the organ's layers, and where it is kept; empty after `insert`."""
        places = self.explant_places or [
            ExplantLayer(path=self.explant, layer=number) if self.explant is not None else None
            for number in range(len(self.explant_origins))
        ]
        return [
            (origin, place) if origin is not None and place is not None else None
            for origin, place in zip(self.explant_origins, places, strict=True)
        ]


class ChangedLayer(_Part):
    """One layer that a recovery trained."""

    origin: Origin
    """Where the layer came from, with the digest that it had before."""
    digest: Digest
    """Digest of the layer's tensors afterwards."""
    tensors: list[str]
    """Names, inside the layer, of the tensors that are not what they were."""
    explant: ExplantPath | None
    """Path, relative to the model directory, of the organ file that holds the layer as it was; `None` for the organ's
    own layers, which a removal takes out anyway."""
    explant_layer: Count = 0
    """Number of the layer in that file."""


class Stage(_Part):
    """One stage of a recovery: what trained together, and for how long."""

    layers: list[Count]
    """Numbers, in the model, of the layers in which something trained."""
    parameters: Count
    """How many numbers trained."""
    steps: Count
    tokens_seen: Count


class Recovery(_Part):
    """One training around an organ after its transplant."""

    organ: Name
    scope: Scope
    neighbours: Count
    """Layers on each side of the organ that trained with it; 0 unless the scope is `neighbours`."""
    unfreeze: Unfreeze
    stages: list[Stage]
    changed: list[ChangedLayer]
    """What is not as it was before, the organ's own layers included."""
    training: Training
    evaluations: list[Evaluation]
    """Perplexity before and after, on held-out text and, if that was given, on general text."""
    when: str


class LinkedFile(_Part):
    """What shows that a file was not written to since; it shares its bytes with the recipient's and was not read."""

    size: Count
    mtime_ns: int
    """Time of the last change, nanoseconds since 1970."""


class SurgicalRecord(_Part):
    """`neurograft.json` beside a transplanted model: what was done, and what the original was."""

    schema_version: Annotated[int, Field(ge=1)] = SCHEMA_VERSION
    neurograft_version: str
    recipient: str
    original_config: str
    """The original's `config.json`, verbatim."""
    original_tensors_digest: Digest | None
    """`None` if some of the original's tensors were linked and never read."""
    original_config_digest: Digest
    tensors_digest: Digest | None
    config_digest: Digest
    layers: list[Origin]
    """One entry for each layer of this model, in order."""
    operations: list[Operation]
    recoveries: list[Recovery] = []
    """In the order in which they were done; absent in schema 1."""
    linked: dict[str, LinkedFile] = {}
    """Files whose tensors have no digest here, by name."""
