"""Merges: the arithmetic of the papers, an organ again that names its parents, and a refusal of what means nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import Factory
from neurograft import check, extract, merge, train, transplant
from neurograft.errors import IncompatibleError, ModelError, UsageError
from neurograft.merging import merge_tensors
from neurograft.organ import Organ, read_organ
from tiny import load, logits, make_model, make_tokenizer

Trained = Callable[..., Organ]


@pytest.fixture
def trained(organ: Organ) -> Trained:
    """Return a function that gives an organ as training might have left it, from the layers that `organ` holds."""

    def get(name: str, seed: int, **update: Any) -> Organ:
        generator = torch.Generator().manual_seed(seed)
        tensors = {
            key: tensor + 0.05 * torch.randn(tensor.shape, generator=generator) for key, tensor in organ.tensors.items()
        }
        values = {"name": name, "probe": None, **update}
        return Organ(organ.manifest.model_copy(update=values), tensors)

    return get


def _like(base: list[float], *vectors: list[float]) -> tuple[Organ, list[dict[str, torch.Tensor]]]:
    """Return an original with one tensor, and organs that lie `vectors` away from it."""
    start = torch.tensor(base)
    original = Organ(None, {"layers.0.w": start})  # type: ignore[arg-type]
    return original, [{"layers.0.w": start + torch.tensor(vector)} for vector in vectors]


def test_ties_by_hand() -> None:
    original, organs = _like([10.0, 20.0, 30.0, 40.0, 50.0], [4.0, -3.0, 2.0, 0.5, 0.0], [2.0, 5.0, 0.5, -0.25, -4.0])
    settings = {"method": "ties", "density": 0.6, "scale": 2.0}
    # Kept are the 3 largest of 5: [4, -3, 2, ., .] and [2, 5, ., ., -4]. Elected: + + + . -, so -3 does not count.
    added = [3.0, 5.0, 2.0, 0.0, -4.0]
    merged = merge_tensors(organs, [0.5, 0.5], original, settings)["layers.0.w"]
    assert merged.tolist() == [base + 2 * value for base, value in zip([10, 20, 30, 40, 50], added, strict=True)]
    # With four fifths of the weight behind it, -3 is elected over 5.
    merged = merge_tensors(organs, [0.8, 0.2], original, settings | {"scale": 1.0})["layers.0.w"]
    assert merged.tolist() == pytest.approx([10 + (0.8 * 4 + 0.2 * 2), 17, 32, 40, 46])


def test_ties_takes_its_threshold_over_the_whole_organ() -> None:
    original = Organ(None, {"a": torch.zeros(4), "b": torch.zeros(4)})  # type: ignore[arg-type]
    organ = {"a": torch.tensor([1.0, 2.0, 3.0, 4.0]), "b": torch.tensor([5.0, 6.0, 7.0, 8.0])}
    merged = merge_tensors([organ, organ], [0.5, 0.5], original, {"method": "ties", "density": 0.5, "scale": 1.0})
    assert merged["a"].tolist() == [0, 0, 0, 0] and merged["b"].tolist() == [5, 6, 7, 8]


def test_dare_keeps_the_share_and_the_expectation() -> None:
    size, settings = 20_000, {"method": "dare", "density": 0.25, "scale": 1.0, "seed": 7}
    original, organs = _like([1.0] * size, [2.0] * size, [0.0] * size)
    merged = merge_tensors(organs, [1.0, 0.0], original, settings)["layers.0.w"] - 1
    kept = merged != 0
    assert merged[kept].unique().tolist() == [8.0]  # 2 / 0.25
    assert float(kept.float().mean()) == pytest.approx(0.25, abs=0.01)
    again = merge_tensors(organs, [1.0, 0.0], original, settings)["layers.0.w"] - 1
    assert torch.equal(again, merged)
    other = merge_tensors(organs, [1.0, 0.0], original, settings | {"seed": 8})["layers.0.w"] - 1
    assert not torch.equal(other, merged)


def test_dare_draws_for_each_organ_anew() -> None:
    original, organs = _like([0.0] * 2000, [1.0] * 2000, [1.0] * 2000)
    settings = {"method": "dare", "density": 0.5, "scale": 1.0, "seed": 0}
    merged = merge_tensors(organs, [0.5, 0.5], original, settings)["layers.0.w"]
    assert set(merged.tolist()) == {0.0, 1.0, 2.0}


@pytest.mark.parametrize(("method", "density"), [("average", None), ("ties", 1.0), ("dare", 1.0)])
def test_an_organ_merged_with_itself_is_itself(
    method: Any, density: float | None, trained: Trained, donor: Path
) -> None:
    organ = trained("a", 1)
    base = None if method == "average" else donor
    merged = merge([organ, organ], method=method, density=density, base=base, weights=[3, 1])
    for name, tensor in organ.tensors.items():
        torch.testing.assert_close(merged.tensors[name], tensor, rtol=1e-5, atol=1e-6)


def test_an_average_is_the_weighted_mean(trained: Trained, recipient: Path, tmp_path: Path) -> None:
    first, second = trained("a", 1).save(tmp_path / "a.safetensors"), trained("b", 2)
    merged = merge(
        [tmp_path / "a.safetensors", second],
        weights=[3, 1],
        output=tmp_path / "m.safetensors",
        name="both",
        version="2.0.0",
    )
    for name, tensor in read_organ(tmp_path / "m.safetensors").tensors.items():
        torch.testing.assert_close(tensor, 0.75 * first.tensors[name] + 0.25 * second.tensors[name])
    manifest = read_organ(tmp_path / "m.safetensors").manifest
    assert manifest == merged.manifest and (manifest.name, manifest.version) == ("both", "2.0.0")
    assert manifest.merged is not None and manifest.merged.method == "average" and manifest.merged.base is None
    one, two = manifest.merged.parents
    assert (one.name, one.version, one.weight) == ("a", "0.1.0", 0.75) and two.weight == 0.25
    assert one.file_digest == first.manifest.file_digest and two.file_digest is None
    assert one.tensors_digest == first.manifest.tensors_digest != two.tensors_digest
    assert manifest.training is None and manifest.source == first.manifest.source
    notes = [finding.why for finding in check(merged, recipient).findings if finding.subject == "training"]
    assert notes == ["the organ was merged from a, b, not trained"]


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "qwen3_moe"])
def test_a_merged_organ_is_an_organ_in_every_way(kind: str, model_directory: Factory, tmp_path: Path) -> None:
    donor = model_directory(kind, seed=0)
    organ = extract(donor, layers=(2, 4), name="x", verify="layers")
    moved = Organ(organ.manifest, {n: t + 0.02 if t.is_floating_point() else t for n, t in organ.tensors.items()})
    merged = merge([organ, moved], method="ties", density=1.0, base=organ, output=tmp_path / "m.safetensors")
    assert merged.manifest.probe is not None  # so the transplant is held against what the merged layers compute
    transplant(tmp_path / "m.safetensors", model_directory(kind, seed=1), output=tmp_path / "out", verify="layers")
    assert logits(load(tmp_path / "out")).isfinite().all()


def test_the_base_is_a_model_or_an_organ(trained: Trained, organ: Organ, donor: Path, tmp_path: Path) -> None:
    organ.save(tmp_path / "base.safetensors")
    given = [trained("a", 1), trained("b", 2)]
    bases: list[Any] = [donor, str(tmp_path / "base.safetensors"), organ]
    merged = [merge(given, method="ties", base=base) for base in bases]
    for name, tensor in merged[0].tensors.items():
        assert all(torch.equal(tensor, other.tensors[name]) for other in merged[1:])
    assert not torch.equal(merged[0].tensors[name], merge(given).tensors[name])
    assert merged[0].manifest.merged is not None and merged[0].manifest.merged.base == organ.manifest.source.model


def test_inserted_organs_began_as_identities(donor: Path, organ: Organ, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("\n\n".join(f"case {number}: kidney well" for number in range(12)))
    given = [
        train(
            organ, host=donor, data=tmp_path / "text.txt", protocol="insert", name=name, seed=seed,
            steps=3, batch_size=2, sequence_length=16, lr=1e-2,
        )
        for seed, name in enumerate(("a", "b"))
    ]  # fmt: skip
    plain, ties = merge(given), merge(given, method="dare", density=1.0, base=donor)
    for name, tensor in plain.tensors.items():
        torch.testing.assert_close(ties.tensors[name], tensor, rtol=1e-4, atol=1e-6)
    assert ties.manifest.recommended_mode == "insert"


def test_half_precision_stays(model_directory: Factory, tmp_path: Path) -> None:
    make_model("llama", seed=0).bfloat16().save_pretrained(tmp_path / "half")
    make_tokenizer().save_pretrained(tmp_path / "half")
    organ = extract(tmp_path / "half", layers=(2, 4), name="x")
    moved = Organ(organ.manifest, {name: tensor * 1.5 for name, tensor in organ.tensors.items()})
    merged = merge([organ, moved], method="ties", density=0.5, base=tmp_path / "half")
    assert {tensor.dtype for tensor in merged.tensors.values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"method": "slerp"}, "the method is 'slerp'; it can be average, ties, dare"),
        ({"method": "ties"}, "needs the layers that the organs were made from: give --base MODEL or --base ORGAN"),
        ({"density": 0.5}, "--density has no meaning for the method average"),
        ({"method": "ties", "seed": 1, "base": "donor"}, "--seed has no meaning for the method ties"),
        ({"method": "ties", "base": "donor", "density": 0.0}, "the density is 0; it must be above 0 and at most 1"),
        (
            {"method": "ties", "base": "donor", "scale": float("nan")},
            "the scale is nan; it must be a finite number above",
        ),
        ({"method": "dare", "base": "donor", "seed": -1}, "the seed is -1; it must not be negative"),
        ({"weights": [1.0]}, "1 weights were given for 2 organs"),
        ({"weights": [1.0, -1.0]}, "the weights are 1, -1; give numbers from 0 up, not all 0"),
        ({"weights": [0.0, 0.0]}, "give numbers from 0 up, not all 0"),
        ({"version": "banana"}, "'banana'; write a semantic version"),
    ],
)
def test_options_that_are_wrong(options: dict[str, Any], reason: str, trained: Trained, donor: Path) -> None:
    options = {name: donor if value == "donor" else value for name, value in options.items()}
    with pytest.raises(UsageError, match=reason):
        merge([trained("a", 1), trained("b", 2)], **options)


def test_organs_that_mean_nothing_together(trained: Trained, donor: Path, recipient: Path, organ: Organ) -> None:
    first = trained("a", 1)
    with pytest.raises(UsageError, match="1 organ was given; a merge takes two or more"):
        merge([first])
    reason = r"a was made from layers 2:4 of llama\S* and b from layers 1:3 of llama\S*, which are not the same layers"
    with pytest.raises(IncompatibleError, match=reason):
        merge([first, extract(donor, layers=(1, 3), name="b")])
    with pytest.raises(IncompatibleError, match="a was trained to replace at position 2 and b to insert at position 2"):
        merge([first, trained("b", 2, recommended_mode="insert")])
    config = {**organ.manifest.anatomy.config, "rms_norm_eps": 0.5}
    other = trained("b", 2, anatomy=organ.manifest.anatomy.model_copy(update={"config": config}))
    with pytest.raises(
        IncompatibleError, match=r"a and b can't be merged: rms_norm_eps is 1e-06 in one and 0\.5 in the"
    ):
        merge([first, other])
    for base in (recipient, extract(donor, layers=(1, 3)), trained("c", 3)):
        with pytest.raises(IncompatibleError, match="does not hold what a was made from, layers 2:4 of llama"):
            merge([first, trained("b", 2)], method="ties", base=base)
    with pytest.raises(ModelError, match="there is no model at"):
        merge([first, trained("b", 2)], method="ties", base="no/where/at/all")


def test_outputs_that_must_not_be_written(trained: Trained, donor: Path, tmp_path: Path) -> None:
    trained("a", 1).save(tmp_path / "a.safetensors")
    given: list[Any] = [tmp_path / "a.safetensors", trained("b", 2)]
    for output, reason in [
        (tmp_path / "a.safetensors", "overlaps the input"),
        (tmp_path / "m.bin", "ends in .safetensors"),
        (donor / "m.safetensors", "overlaps the input"),
    ]:
        with pytest.raises(UsageError, match=reason):
            merge(given, method="ties", base=donor, output=output, overwrite=True)
