"""The paper's five questions at 135M parameters: what `neurograft study paper` finds on two real domains.

Run it with `python benchmarks/paper.py`; about an hour on one core. It needs the demo's packaged model and ontology
(`make venv` installs both), and apt for the dictionary. What is finished is kept, and it goes on from there. It writes
benchmarks/results/paper.json; the study's own folder, with its page, is in the cache.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from neurograft import data, study_paper
from neurograft.demonstration import find_packaged_model
from neurograft.models import cache_directory
from render import describe_run
from texts import read_domain, read_general

RESULT = Path(__file__).parent / "results" / "paper.json"
DOMAINS = ("clinical", "dictionary")
TOKENS = 340_000


def main() -> None:
    """Run the study on clinical definitions and dictionary entries; the Python language reference is general text."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=TOKENS, help="training tokens of everything together")
    tokens = parser.parse_args().tokens
    folder = cache_directory() / "benchmarks"
    folder.mkdir(parents=True, exist_ok=True)
    report = study_paper(
        find_packaged_model(),
        domains={name: data.Documents(read_domain(name)) for name in DOMAINS},
        general=data.Documents(read_general()),
        output=folder / f"paper-{tokens}",
        tokens=tokens,
        sequence_length=128,
        batch_size=2,
        eval_tokens=1024,
        trials=2,
        overwrite=True,
    )
    content = {"run": describe_run("python benchmarks/paper.py"), "report": report.model_dump(mode="json")}
    RESULT.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
