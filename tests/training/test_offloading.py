"""With layers left on the disk, training comes to the same bits, and never holds more than one of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from conftest import Factory
from neurograft import extract, graft, train
from neurograft.cli import app
from neurograft.errors import ModelError, NeurograftError, UsageError
from neurograft.files import tensors_digest
from neurograft.models import load_model, resolve
from neurograft.organ import Organ, read_organ
from neurograft.training import filling
from neurograft.training.loop import TrainingProgress, TrainingRun
from neurograft.training.offloading import OffloadedLayers, bytes_in_memory, load_offloaded
from neurograft.training.prefix import Prefix, stored_digest
from tiny import CONFIGS, FURTHER, LAYERS, load, logits, make_model, make_tokenizer, save_model

QUICK: dict[str, Any] = {
    "epochs": 3, "sequence_length": 16, "batch_size": 3, "lr": 1e-2, "evaluations": 3, "patience": 9, "seed": 3,
    "precision": "float32",
}  # fmt: skip
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "reports.jsonl"
    documents = [f"report {number}: grade {number % 4}, seen in the left lung" for number in range(12)]
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    return path


@pytest.fixture(autouse=True)
def _no_cache_from_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEUROGRAFT_CACHE", str(tmp_path / "own-cache"))


@pytest.fixture(autouse=True)
def _one_way_to_attend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Don't let the moment decide which way is faster: two runs that are compared must compute alike."""
    monkeypatch.setattr("neurograft.training.loop.choose_attention", lambda *_: "fused")


def _both(organ: Organ, host: Path, text: Path, monkeypatch: pytest.MonkeyPatch, cache: Path, **options: Any) -> Any:
    """Train with the host whole and with its lower layers on the disk, each with a cache of its own."""
    trained = []
    for offload in (False, True):
        monkeypatch.setenv("NEUROGRAFT_CACHE", str(cache / str(offload)))
        trained.append(train(organ, host=host, data=text, offload=offload, **{**QUICK, **options}))
    return trained


def _same(whole: Organ, parts: Organ) -> None:
    assert tensors_digest(whole.tensors) == tensors_digest(parts.tensors)
    first, second = (one.manifest.model_dump() for one in (whole, parts))
    for one in (first, second):
        one.pop("created"), one["training"].pop("seconds")
    assert first == second


def _moved(*args: Any, **kwargs: Any) -> Any:
    """Load a model whose tensors do not lie where they lie in the file.

    The products of grouped experts come to other bits where weights begin at other multiples of 16 bytes.
    """
    model = load_model(*args, **kwargs)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


@pytest.mark.parametrize("kind", sorted(CONFIGS))
def test_the_same_bits(
    kind: str, model_directory: Factory, text: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if kind == "gpt_oss":
        monkeypatch.setattr("neurograft.training.host.load_model", _moved)
    host = model_directory(kind)
    organ = extract(host, layers=(3, 5))
    whole, parts = _both(organ, host, text, monkeypatch, tmp_path)
    _same(whole, parts)
    assert tensors_digest(parts.tensors) != tensors_digest(organ.tensors)


@pytest.mark.parametrize(
    ("at", "options"),
    [
        (4, {"protocol": "insert"}),
        (0, {"protocol": "insert"}),
        (LAYERS, {"protocol": "insert"}),
        (0, {"protocol": "in_place"}),
        (1, {"protocol": "in_place"}),
        (4, {"protocol": "in_place", "host_precision": "stored"}),
        (4, {"protocol": "in_place", "cache_dtype": "bfloat16"}),
        (4, {"protocol": "in_place", "rank": 2, "optimizer": "muon"}),
        (None, {"protocol": "standalone"}),
    ],
)
def test_the_same_bits_by_every_protocol(
    at: int | None, options: Any, donor: Path, organ: Organ, text: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _same(*_both(organ, donor, text, monkeypatch, tmp_path, at=at, **options))


def test_a_run_that_sees_a_part_of_the_text_once(
    donor: Path, organ: Organ, text: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _same(*_both(organ, donor, text, monkeypatch, tmp_path, epochs=None, steps=3, accumulate=2))
    there = [path.read_bytes() for path in (tmp_path / "True" / "prefix").glob("*/there.bin")]
    training = max(there, key=len)
    assert sum(training) == 3 * 2 * 3 < len(training)


@pytest.mark.parametrize("tied", [True, False])
def test_a_host_in_half_precision(tied: bool, text: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = make_model("llama", tie_word_embeddings=tied)
    torch.nn.Module.to(model, torch.bfloat16)
    model.save_pretrained(tmp_path / "half", max_shard_size="40kB")
    make_tokenizer().save_pretrained(tmp_path / "half")
    assert len(list((tmp_path / "half").glob("*.safetensors"))) > 1
    organ = extract(tmp_path / "half", layers=(3, 5))
    whole, parts = _both(organ, tmp_path / "half", text, monkeypatch, tmp_path, host_precision="stored")
    _same(whole, parts)
    assert {tensor.dtype for tensor in parts.tensors.values()} == {torch.bfloat16}
    assert parts.manifest.probe is not None and parts.manifest.probe.dtype == "bfloat16"
    claim, wide = parts.manifest.evaluations[0], train(organ, host=tmp_path / "half", data=text, **QUICK)
    assert claim.after < claim.before
    # The same but for rounding to 8 bits on the way up and down.
    assert wide.manifest.evaluations[0].after == pytest.approx(claim.after, rel=0.03)
    model = load(tmp_path / "half")
    with graft(model, parts):  # its answers to the probe are those that it gives here
        assert model.dtype == torch.bfloat16


def test_a_half_precision_host_has_a_float32_organ(text: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = make_model("llama")
    torch.nn.Module.to(model, torch.bfloat16)
    model.save_pretrained(tmp_path / "half")
    make_tokenizer().save_pretrained(tmp_path / "half")
    dtypes: list[dict[str, torch.dtype]] = []
    step = TrainingRun._step

    def spied(run: TrainingRun, rows: list[int]) -> None:
        dtypes.append({name: parameter.dtype for name, parameter in run.model.named_parameters()})
        step(run, rows)

    monkeypatch.setattr(TrainingRun, "_step", spied)
    organ = extract(tmp_path / "half", layers=(3, 5))
    trained = train(organ, host=tmp_path / "half", data=text, host_precision="stored", **QUICK)
    wide = {name for name, dtype in dtypes[0].items() if dtype == torch.float32}
    assert wide == {name for name in dtypes[0] if name.startswith(("model.layers.3.", "model.layers.4."))}
    assert trained.manifest.training is not None
    assert trained.manifest.training.hyperparameters["host_precision"] == "stored"


def test_one_layer_at_a_time_each_once(donor: Path, organ: Organ, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held, reads, before = OffloadedLayers.held, list[int](), list[int]()

    @contextmanager
    def watched(layers: OffloadedLayers, number: int) -> Iterator[None]:
        if number not in layers._held:
            before.append(bytes_in_memory(layers._model))
            reads.append(number)
        with held(layers, number):
            in_memory.append(bytes_in_memory(layers._model))
            assert len(layers._held) == 1
            yield

    in_memory: list[int] = []
    monkeypatch.setattr(OffloadedLayers, "held", watched)
    train(organ, host=donor, data=text, at=4, offload=True, **QUICK)
    model = load(donor)
    layer = sum(parameter.nbytes for parameter in model.get_submodule("model.layers.0").parameters())
    everything = sum(parameter.nbytes for parameter in model.parameters())
    # One is asked how it returns what it computes; all are asked whether the organ needs no more of them; all fill; and
    # all run once for the sketch, whose windows are equally long here.
    sketched = [0, 1, 2, 3]
    assert reads == [0, 0, 1, 2, 3, 0, 1, 2, 3, *sketched]
    assert set(before[1:]) == {everything - 4 * layer} and set(in_memory[2:]) == {everything - 3 * layer}
    reads.clear()
    train(organ, host=donor, data=text, at=4, offload=True, **QUICK)
    assert reads == [0, 0, 1, 2, 3, *sketched]  # what they gave is there


def test_interrupted_while_the_layers_are_read(
    donor: Path, organ: Organ, text: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    whole, passed, over = train(organ, host=donor, data=text, at=4, **QUICK), list[int](), list[bool]()
    climb = filling._Stage.write
    monkeypatch.setenv("NEUROGRAFT_CACHE", str(tmp_path / "again"))

    def interrupted(stage: Any, rows: Any, layers: int, states: Any) -> None:
        passed.append(layers)
        climb(stage, rows, layers, states)
        if len(passed) == 15 and not over:
            over.append(True)
            raise KeyboardInterrupt

    monkeypatch.setattr(filling._Stage, "write", interrupted)
    with pytest.raises(KeyboardInterrupt, match="the same command goes on from there"):
        train(organ, host=donor, data=text, at=4, offload=True, **QUICK)
    assert passed[-1] == 2
    left = sorted(path.name for path in (tmp_path / "again" / "prefix").iterdir())
    assert len(left) == 4 and any(name.endswith(".below") for name in left)
    passed.clear()
    parts = train(organ, host=donor, data=text, at=4, offload=True, **QUICK)
    assert 1 not in passed and passed.count(2) < passed.count(3)
    _same(whole, parts)
    assert not list((tmp_path / "again" / "prefix").glob("*.below"))


def test_what_was_interrupted_does_not_mislead_a_run_with_other_batches(
    donor: Path, organ: Organ, text: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    other = {**QUICK, "batch_size": 2, "seed": 5}
    whole = train(organ, host=donor, data=text, eval_data=text, at=4, **other)
    monkeypatch.setenv("NEUROGRAFT_CACHE", str(tmp_path / "again"))
    read = OffloadedLayers.held

    def interrupted(layers: OffloadedLayers, number: int) -> Any:
        if number == 3 and list((tmp_path / "again" / "prefix").glob("*.below")):
            raise KeyboardInterrupt
        return read(layers, number)

    with monkeypatch.context() as patch:
        patch.setattr(OffloadedLayers, "held", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(organ, host=donor, data=text, eval_data=text, at=4, offload=True, **QUICK)
    assert len(list((tmp_path / "again" / "prefix").glob("*.below"))) == 2
    _same(whole, train(organ, host=donor, data=text, eval_data=text, at=4, offload=True, **other))


def test_two_runs_on_the_same_text_at_once(
    donor: Path, organ: Organ, text: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    whole, climb, places = train(organ, host=donor, data=text, at=4, **QUICK), filling._climb, list[Path]()
    monkeypatch.setenv("NEUROGRAFT_CACHE", str(tmp_path / "again"))
    trained: list[Organ] = []

    def meanwhile(*arguments: Any) -> None:
        if not places:  # once the first has its place, the second begins and ends
            places.extend((tmp_path / "again" / "prefix").glob("*.below"))
            trained.append(train(organ, host=donor, data=text, at=4, offload=True, **QUICK))
        climb(*arguments)

    monkeypatch.setattr(filling, "_climb", meanwhile)
    trained.append(train(organ, host=donor, data=text, at=4, offload=True, **QUICK))
    assert len(places) == 2 and len(trained) == 2
    for parts in trained:
        _same(whole, parts)
    assert not list((tmp_path / "again" / "prefix").glob("*.below"))


def test_interrupted_while_it_trains_and_gone_on_without(donor: Path, organ: Organ, text: Path, tmp_path: Path) -> None:
    whole = train(organ, host=donor, data=text, at=4, **QUICK)

    def interrupt(progress: TrainingProgress) -> None:
        if progress.step == 4:
            raise KeyboardInterrupt

    output = tmp_path / "o.safetensors"
    with pytest.raises(KeyboardInterrupt, match="after step 4 of"):
        train(organ, host=donor, data=text, at=4, output=output, offload=True, progress=interrupt, **QUICK)
    _same(whole, _sealed(whole, train(organ, host=donor, data=text, at=4, output=output, **QUICK)))


def _sealed(whole: Organ, saved: Organ) -> Organ:
    """Return an organ with the digests of its file taken back, to compare it with one that was not written."""
    seals = ("file_digest", "tensors_digest")
    return Organ(saved.manifest.model_copy(update={n: getattr(whole.manifest, n) for n in seals}), saved.tensors)


@pytest.mark.parametrize("kind", sorted({**CONFIGS, **FURTHER}))
def test_a_model_in_parts_computes_what_it_computes_whole_or_is_refused(
    kind: str, model_directory: Factory, monkeypatch: pytest.MonkeyPatch
) -> None:
    try:
        host = model_directory(kind)
        whole = load_model(host, dtype=torch.float32)
    except (ModelError, ValueError, RuntimeError, KeyError, ImportError):
        pytest.skip(f"transformers does not save and load a tiny {kind}")
    try:
        parts, _ = load_offloaded(resolve(host), range(3), dtype=torch.float32, device=CPU)
    except ModelError as error:
        assert kind not in CONFIGS and len(str(error)) > 20
        return
    assert torch.equal(logits(parts), logits(whole))
    absent = [name for name, parameter in parts.named_parameters() if parameter.is_meta]
    assert absent and len(absent) < len(list(parts.named_parameters()))


def test_what_carries_more_than_hidden_states_is_refused(
    donor: Path, organ: Organ, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Prefix, "works", lambda _: False)
    with pytest.raises(
        NeurograftError, match=r"what enters layer 2 of this llama model can't be cached, .*--offload out"
    ):
        train(organ, host=donor, data=text, offload=True, **QUICK)


def test_too_little_disk_for_the_way_up(
    donor: Path, organ: Organ, text: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import shutil

    usage = shutil.disk_usage(tmp_path)._replace(free=100_000)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    with pytest.raises(
        NeurograftError, match=r"on their way through the layers below the organ take .* kB, and .*--offload"
    ):
        train(organ, host=donor, data=text, at=4, offload=True, **{**QUICK, "sequence_length": 32})
    assert not list((tmp_path / "own-cache" / "prefix").glob("*.below"))


def test_a_packed_host(text: Path, tmp_path: Path, organ: Organ, donor: Path) -> None:
    import shutil

    shutil.copytree(donor, tmp_path / "packed")
    config = json.loads((tmp_path / "packed" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "packed" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"packed is quantised \(gptq\); train without --offload"):
        train(organ, host=tmp_path / "packed", data=text, offload=True, **QUICK)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"offload": True, "cache_prefix": "never"}, "offload keeps on disk what enters the organ"),
        ({"offload": True, "at": 7}, "position 7 is out of range"),
        ({"host_precision": "int3"}, "--host-precision: "),
        ({"host_precision": "nf4"}, "--host-precision nf4 needs a GPU, and there is none"),
    ],
)
def test_what_makes_no_sense(options: dict[str, Any], message: str, donor: Path, organ: Organ, text: Path) -> None:
    with pytest.raises(UsageError, match=message):
        train(organ, host=donor, data=text, **{**QUICK, **options})


def test_four_bits_and_a_host_that_is_spread(
    donor: Path, organ: Organ, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("neurograft.training.host.spreads", lambda: True)
    with pytest.raises(UsageError, match="--host-precision nf4 goes with DDP"):
        train(organ, host=donor, data=text, host_precision="nf4", **QUICK)


def test_four_bits_need_bitsandbytes(donor: Path, organ: Organ, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("neurograft.training.host.starting_device", lambda: torch.device("cuda"))
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(UsageError, match=r"nf4 needs bitsandbytes; install neurograft\[nf4\]"):
        train(organ, host=donor, data=text, host_precision="nf4", **QUICK)


def test_a_host_in_four_bits(text: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    # It computes on CPUs too, but for a packing of its own there, through which no gradient comes.
    monkeypatch.setattr("neurograft.training.protocols.check_precision", lambda _: None)
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)
    host = save_model(tmp_path / "host", "llama", hidden_size=64, intermediate_size=128)
    organ, packed = extract(host, layers=(3, 5)), list[set[str]]()
    step = TrainingRun._step

    def spied(run: TrainingRun, rows: list[int]) -> None:
        if not packed:
            packed.append({name for name, parameter in run.model.named_parameters() if parameter.dtype == torch.uint8})
        step(run, rows)

    monkeypatch.setattr(TrainingRun, "_step", spied)
    whole, parts = _both(organ, host, text, monkeypatch, tmp_path, host_precision="nf4")
    _same(whole, parts)
    assert len(packed[0]) == 4 * 7 and not any(name.startswith(("model.layers.3", "lm_head")) for name in packed[0])
    claim, wide = parts.manifest.evaluations[0], train(organ, host=host, data=text, **QUICK).manifest.evaluations[0]
    assert claim.after < claim.before != wide.before
    assert claim.before == pytest.approx(wide.before, rel=0.2)


def test_scales_are_a_part_of_what_four_bits_depend_on() -> None:
    functional = pytest.importorskip("bitsandbytes.nn")
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    digests = []
    for factor in (1, 1, 2):
        packed = functional.Params4bit(
            factor * weight, requires_grad=False, quant_type="nf4", compress_statistics=False
        ).to("cpu")
        digests.append(stored_digest(packed))
    assert digests[0] == digests[1] != digests[2]


def test_the_command(donor: Path, organ_file: Path, text: Path, tmp_path: Path) -> None:
    command = [
        "train",
        str(organ_file),
        "--host",
        str(donor),
        "--data",
        str(text),
        "-o",
        str(tmp_path / "o.safetensors"),
    ]
    result = CliRunner().invoke(app, [*command, "--offload", "--host-precision", "stored", "--steps", "2", "--json"])
    assert result.exit_code == 0, result.output
    assert read_organ(tmp_path / "o.safetensors").manifest.training is not None
    result = CliRunner().invoke(app, [*command, "--overwrite", "--host-precision", "nf4"])
    assert result.exit_code == 2 and "needs a GPU" in result.stderr
