"""An audit finds what an organ remembers, finds nothing where there is nothing, and refuses what would mislead."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from by_heart import LEARN, Case, sentences, write
from typer.testing import CliRunner

from conftest import Factory
from neurograft import graft, plant, train
from neurograft.bank.card import model_card
from neurograft.cli import app
from neurograft.data import separator_token, tokenize_documents
from neurograft.errors import DataError, UsageError
from neurograft.loss import NextTokenLoss
from neurograft.models import load_tokenizer
from neurograft.organ import Organ, read_manifest
from neurograft.privacy import canaries, membership, verbatim
from neurograft.privacy.scoring import ScoredDocument, Stretch, score_documents
from tiny import load, make_model


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory, model_directory: Factory) -> Case:
    host = model_directory("llama", hidden_size=64, intermediate_size=128, layers=4, initializer_range=0.2)
    return Case(tmp_path_factory.mktemp("audit"), host)


def test_what_was_learnt_by_heart_is_found(case: Case) -> None:
    found = case.audit().audit
    assert found.members_verified and (found.members, found.non_members) == (12, 12)
    for figures in found.membership:
        assert figures.auc > 0.9 and figures.auc_low > 0.8 and figures.true_positives > 0.5, figures
        assert figures.host_auc is None or 0.2 < figures.host_auc < 0.8
    members, others = found.extraction
    assert (members.text, others.text) == ("members", "non-members")
    assert members.recited > 3 and members.recited_by_host == others.recited == 0
    assert members.longest >= 8 > others.longest
    assert found.canaries.exposure_median > 2 and found.canaries.correct >= 0.9 * found.canaries.guesses
    assert found.canaries.epsilon > 0.5


def test_nothing_is_found_where_nothing_was_learnt(case: Case) -> None:
    found = case.audit(case.blank, members=case.members).audit
    assert not found.members_verified
    reference = next(figures for figures in found.membership if figures.attack == "reference")
    assert reference.auc == 0.5 and reference.true_positives == 0
    loss = next(figures for figures in found.membership if figures.attack == "loss")
    assert loss.auc == loss.host_auc
    assert found.canaries.epsilon == 0 and found.extraction[0].recited == found.extraction[0].recited_by_host


def test_the_audit_is_recorded_in_figures(case: Case) -> None:
    before = read_manifest(case.file)
    report = case.audit(case.file, record=True)
    after = read_manifest(case.file)
    assert report.recorded and not report.signatures_void and after.audits == [report.audit] and before.audits == []
    assert after.tensors_digest == before.tensors_digest
    text = case.file.read_bytes().decode("utf-8", "replace")
    for sentence in [*sentences(12, 0), *sentences(12, 1), *canaries.read_canaries(case.secret).included]:
        assert sentence[:12] not in text
    again = train(
        Organ(after, case.organ.tensors),
        host=case.host,
        data=case.members,
        eval_data=case.members,
        **{**LEARN, "steps": 1},
    )
    assert again.manifest.audits == []


def test_recited_is_what_greedy_decoding_generates(case: Case) -> None:
    model: Any = load(case.host)
    tokenizer = load_tokenizer(case.host)
    documents = [*sentences(12, 0)[:5], *sentences(2, 1)]
    lists, separator, prefix = tokenize_documents(documents, tokenizer), separator_token(tokenizer), 4
    with graft(model, case.organ):
        scored = score_documents(model, lists, sequence_length=64, batch_size=3, separator_id=separator)
        for tokens, document in zip(lists, scored, strict=True):
            runs = []
            for start in range(prefix, len(tokens)):
                given = torch.tensor([[separator, *tokens[:start]]])
                written = model.generate(
                    given, attention_mask=torch.ones_like(given), max_new_tokens=len(tokens) - start, do_sample=False,
                    pad_token_id=0, eos_token_id=None,
                )[0, start + 1 :].tolist()  # fmt: skip
                same = [own == right for own, right in zip(written, tokens[start:], strict=True)]
                runs.append(same.index(False) if False in same else len(same))
            assert verbatim.longest_recited(document, prefix) == max(runs)


@pytest.mark.parametrize("plain_head", [True, False])
def test_what_is_said_of_tokens_is_what_the_logits_say(plain_head: bool) -> None:
    model = make_model("llama")
    loss = NextTokenLoss(model)
    assert loss.head is not None
    if not plain_head:
        loss.head = None
    ids = torch.arange(600).view(2, 300) % 90
    facts = loss.facts(ids, ids)
    with torch.no_grad():
        logs = model(input_ids=ids).logits[:, :-1].double().log_softmax(-1).flatten(0, 1)
    right = logs.gather(1, ids[:, 1:].reshape(-1, 1)).squeeze(1)
    mean = (logs.exp() * logs).sum(1)
    deviation = ((logs.exp() * logs.square()).sum(1) - mean.square()).sqrt()
    for own, expected in ((facts.losses, -right), (facts.mean, mean), (facts.deviation, deviation)):
        torch.testing.assert_close(own.double(), expected, atol=2e-5, rtol=1e-4)  # float32 against float64
    assert torch.equal(facts.greedy, logs.argmax(1) == ids[:, 1:].flatten())


def test_each_token_is_scored_once_whatever_the_windows(tokenizer: Any) -> None:
    model = make_model("llama")
    lists = tokenize_documents(["abc" * 15, "d", "hello world, hello"], tokenizer)
    settings: dict[str, Any] = {"batch_size": 2, "separator_id": 1}
    scored = score_documents(model, lists, sequence_length=16, **settings)
    assert [len(document.losses) for document in scored] == [len(tokens) for tokens in lists]
    assert [stretch.context for stretch in scored[0].stretches] == [0, 8, 8, 8, 8]
    whole = score_documents(model, lists, sequence_length=64, **settings)
    assert numpy.allclose(scored[2].losses[:15], whole[2].losses[:15], atol=1e-5)


def test_areas_and_true_positives_on_known_scores() -> None:
    members, others = numpy.array([3.0, 2.0, 1.0]), numpy.array([2.0, 0.0])
    assert membership.area_under_curve(members, others) == pytest.approx((2 + 1.5 + 1) / 6)
    assert membership.found_members(members, others) == pytest.approx(1 / 3)
    many = numpy.arange(200.0)
    assert membership.found_members(numpy.array([197.5, 198.5, 199.5, 100.0]), many) == 0.75  # 2 of 200 may be wrong
    assert membership.share_interval(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-3)


def test_runs_do_not_cross_windows() -> None:
    def stretch(context: int, greedy: list[int]) -> Stretch:
        values = numpy.zeros(len(greedy))
        return Stretch(context, values, values, numpy.array(greedy, dtype=bool))

    document = ScoredDocument([stretch(0, [1, 1, 0, 1, 1, 1]), stretch(3, [1, 1, 1, 1])])
    assert verbatim.longest_recited(document, 4) == 3  # the fifth and sixth only; 3 tokens of context and one more
    assert verbatim.longest_recited(document, 3) == 4
    assert verbatim.is_long_enough(document, 3, 4) and not verbatim.is_long_enough(document, 4, 4)


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"prefix": 0}, UsageError, "--prefix is 0"),
        ({"length": 0}, UsageError, "--length is 0"),
        ({"delta": 1.0}, UsageError, "--delta is 1.0"),
        ({"seed": -1}, UsageError, "--seed is -1"),
        ({"bootstrap_samples": 0}, UsageError, "0 bootstrap samples"),
        ({"max_documents": 1}, UsageError, "--max-documents is 1"),
        ({"prefix": 600}, UsageError, "windows of 512 tokens have no room for 600"),
    ],
)
def test_wrong_numbers_are_refused(case: Case, changes: Any, kind: Any, message: str) -> None:
    with pytest.raises(kind, match=message):
        case.audit(**changes)


def test_misleading_text_is_refused(case: Case, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="12 documents are both among the members and among the non-members"):
        case.audit(non_members=case.members)
    single = write(tmp_path / "one.jsonl", ["abc"])
    with pytest.raises(DataError, match="only 1 document among the non-members"):
        case.audit(non_members=single)
    left_out = canaries.read_canaries(case.secret).left_out
    with pytest.raises(DataError, match=f"{len(left_out)} canaries that were to be left out are among the members"):
        case.audit(members=write(tmp_path / "wrong.jsonl", [*sentences(3, 0), *left_out]))
    other = tmp_path / "other.json"
    plant(tmp_path / "other.jsonl", canaries=other, count=20, seed=9)
    with pytest.raises(DataError, match=r"none of the canaries in .* was trained on"):
        case.audit(canaries=other)


def test_an_organ_without_a_file_or_in_a_bank_is_not_recorded_in(case: Case) -> None:
    with pytest.raises(UsageError, match="no file that the audit could be recorded in"):
        case.audit(case.blank, record=True)
    with pytest.raises(UsageError, match="versions never change"):
        case.audit("hf://org/repo@1.0.0", record=True)


def test_what_training_held_out_is_no_member(case: Case, tmp_path: Path) -> None:
    organ = train(case.blank, host=case.host, data=case.members, **{**LEARN, "steps": 1})
    found = case.audit(organ, members=case.members, canaries=None).audit
    assert found.members_verified and found.members == 11 and found.canaries is None


def test_progress_counts_every_token_twice(case: Case) -> None:
    seen: list[tuple[int, int]] = []
    case.audit(progress=lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1] and seen == sorted(seen)


def run(*words: Any) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words])


def test_the_commands_do_the_same(case: Case, tmp_path: Path) -> None:
    planted = ["plant", tmp_path / "canaries.jsonl", "--canaries", tmp_path / "secret.json", "--count", 20, "--json"]
    assert json.loads(run(*planted).stdout)["count"] == 20
    again = run(*planted)
    assert again.exit_code == 2 and "exists already" in json.loads(again.stdout)["error"]["message"]
    assert "keep secret" in run(*planted[:-1], "--overwrite").stdout
    file = tmp_path / "organ.safetensors"
    case.organ.save(file)
    words: list[Any] = ["audit", file, "--host", case.host, "--members", case.members, "--members", case.planted]
    words += ["--non-members", case.others, "--canaries", case.secret, "--prefix", 4, "--length", 8, "--record"]
    found = json.loads(run(*words, "--json").stdout)
    assert found["recorded"] and found["audit"]["members_verified"] and found["audit"]["canaries"]["epsilon"] > 0.5
    shown = run("inspect", file).stdout
    card = model_card(read_manifest(file), "a-bank:organ@0.1.0")
    for text in (shown, card):
        flat = " ".join(text.split())
        assert "of 12 members" in flat and "epsilon is at least" in flat and "min-k%++" in flat
    pretty = run(*words[:-1]).stdout
    assert "no (--record does)" in pretty and "12 members, 12 non-members" in pretty
    wrong = run(*words, "--members", case.others)
    assert wrong.exit_code == 2 and "both among the members" in wrong.stderr
    by_word = run(*words[:4], "--members", case.members, "--non-members", case.others, "--prefix", 4, "--length", 8)
    assert "by word" in by_word.stdout
