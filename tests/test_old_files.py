"""Old files keep working: each schema version has a tiny organ here, with the logits that it must still give.

`python tests/test_old_files.py` writes the file of the present schema, once; a file that was released is never changed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import neurograft
from neurograft.manifest import SCHEMA_VERSION

FOLDER = Path(__file__).parent / "data"
LAYERS = (1, 3)


def make_model(phase: float) -> Any:
    """Return a tiny llama whose weights are a formula's: no release of torch will draw them otherwise."""
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            values = torch.arange(parameter.numel(), dtype=torch.float64) * 0.7 + number + phase
            parameter.copy_((values.sin() * 0.5 + (1.0 if parameter.dim() == 1 else 0.0)).view_as(parameter))
    return model.eval()


def grafted_logits(organ: Path) -> torch.Tensor:
    """Return the logits of the recipient with the organ in it, (T, V)."""
    model = make_model(phase=0.0)
    with neurograft.graft(model, organ, at=LAYERS[0], mode="replace"), torch.no_grad():
        return model(torch.arange(12).unsqueeze(0)).logits[0]


@pytest.mark.parametrize("organ", sorted(FOLDER.glob("organ-v*.safetensors")), ids=lambda path: path.stem)
def test_an_organ_of_each_schema_still_gives_its_logits(organ: Path) -> None:
    expected = torch.tensor(json.loads(organ.with_suffix(".logits.json").read_text()))
    # Another release of torch may add in another order; another meaning of the file would be off by tenths.
    torch.testing.assert_close(grafted_logits(organ), expected, rtol=1e-4, atol=1e-4)
    plain = make_model(phase=0.0)(torch.arange(12).unsqueeze(0)).logits[0]
    assert (plain - expected).abs().max() > 0.1


def test_the_present_schema_has_its_file() -> None:
    assert (FOLDER / f"organ-v{SCHEMA_VERSION}.safetensors").is_file()


def _write(folder: Path) -> None:
    import tempfile

    target = FOLDER / f"organ-v{SCHEMA_VERSION}.safetensors"
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        make_model(phase=0.3).save_pretrained(Path(temporary, "sample"))
        neurograft.extract(
            Path(temporary, "sample"),
            layers=LAYERS,
            output=target,
            name="old-file",
            license="Apache-2.0",
            verify="layers",
        )
    logits = [[round(value, 6) for value in row] for row in grafted_logits(target).tolist()]
    target.with_suffix(".logits.json").write_text(json.dumps(logits) + "\n")


if __name__ == "__main__":
    _write(FOLDER)
