"""A teacher behind a server: the losses of one in this process, and what is told of a server gone wrong."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from completions_server import NAME, Teacher, late, once, serving
from safetensors.torch import load_file
from test_placements import outlook
from test_stages import FEW, run
from tiny import tiny_llama

from compresskit.data.spec import DataSpec
from compresskit.distill.completions import Completions, patience_s
from compresskit.distill.served import Served, learnt_spans, rest_of
from compresskit.distill.stage import Distill
from compresskit.errors import Fault, RunError
from compresskit.modeling import ModelSource, open_model
from compresskit.stage import StageContext, StageResult
from compresskit.training.objective import Listing
from compresskit.training.watch import LossLog

VOCABULARY, K = 258, 8
WHERE = "s.teacher_placement"


@pytest.fixture(scope="module")
def teacher_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("served") / "teacher", seed=1, initializer_range=0.2)


@pytest.fixture
def served(teacher_model: Path) -> Iterator[tuple[str, Teacher]]:
    with serving(teacher_model) as made:
        yield made


@pytest.fixture
def source(tmp_path: Path) -> ModelSource:
    return open_model(str(tiny_llama(tmp_path / "student")))


@pytest.fixture
def text(tmp_path: Path) -> DataSpec:
    path = tmp_path / "text.jsonl"
    stories = (f"The {i}th story is about {i * i}." for i in range(120))
    path.write_text("\n".join(f'{{"text": "{story}"}}' for story in stories))
    return DataSpec(source=str(path), cross_documents=False)


def placement(url: str, **changes: Any) -> dict[str, Any]:
    asked = {"method": "server", "url": url, "model": NAME, "top_k": K, "retries": 2, "backoff_s": 0.01}
    return asked | changes


def completions(url: str, **changes: Any) -> Completions:
    options = {"url": url, "model": NAME, "top_k": K, "vocabulary": VOCABULARY, "retries": 2}
    return Completions(**options | {"backoff_s": 0.01, "timeout_s": 20.0} | changes)


def faults(source: ModelSource, asked: dict[str, Any], **changes: Any) -> list[Fault]:
    return Distill(teacher_placement=asked, **FEW | changes).faults(outlook(source), "s")


def losses(scratch: Path) -> list[float]:
    return LossLog(scratch / "losses.jsonl").losses()


@pytest.mark.parametrize(
    "loss",
    [
        "forward_kl",
        [{"method": "reverse_kl", "weight": 0.5}, {"method": "jsd", "weight": 2.0}],
    ],
)
def test_a_served_teacher_teaches_what_its_top_tokens_say(
    loss: Any, served: Any, source: ModelSource, teacher_model: Path, text: DataSpec, tmp_path: Path
) -> None:
    """Rows hold several documents, which a server sees one at a time."""
    url, teacher = served
    several = [{"method": loss}] if isinstance(loss, str) else loss
    stages = {
        "here": Distill(
            teacher=str(teacher_model), loss=tuple({**one, "top_k": K} for one in several), **FEW
        ),
        "there": Distill(teacher_placement=placement(url), loss=loss, **FEW),
    }
    assert stages["there"].faults(outlook(source), "s") == []
    notes = stages["there"].forecast(outlook(source)).notes
    assert "Teacher, in each process: nothing, it is behind a server." in notes
    found = {}
    for name, stage in stages.items():
        result, _ = run(stage, source, text, tmp_path / name)
        found[name] = result.metrics
    here, there = (losses(tmp_path / name / "scratch") for name in stages)
    assert there == pytest.approx(here, rel=2e-5)
    assert here[0] > 0.1, "nothing was compared"
    assert found["there"]["validation_loss"] == pytest.approx(found["here"]["validation_loss"], rel=2e-5)
    for name, part in found["here"]["final_parts"].items():
        assert found["there"]["final_parts"][name] == pytest.approx(part, rel=2e-5)
    assert max(map(len, teacher.prompts)) <= FEW["context_length"]


def test_only_what_is_learnt_is_asked_for(served: Any) -> None:
    url, teacher = served
    ids = torch.randint(0, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(0))
    positions = torch.tensor([[*range(5), *range(7)], [*range(11), 0]])
    labels = ids.clone()
    labels[0, :6] = -100  # of the first row's first document nothing is learnt
    labels[0, 9:] = -100
    labels[1, [0, 11]] = -100
    provider = Served(server={"url": url, "model": NAME, "top_k": K, "vocabulary": VOCABULARY})
    signal = provider.signal({"input_ids": ids, "position_ids": positions, "labels": labels})
    assert sorted(teacher.prompts, key=len) == [ids[0, 5:9].tolist(), ids[1, :11].tolist()]
    says = signal.says
    assert isinstance(says, Listing)
    with torch.no_grad():
        log_p = teacher.model(ids[1:, :11]).logits.log_softmax(-1)[0]
    expected, order = log_p.topk(K)
    assert torch.equal(says.ids_BTK[1, :10], order[:10])
    torch.testing.assert_close(says.log_p_BTO[1, :10, :K], expected[:10], rtol=1e-5, atol=1e-5)
    rest = log_p.scatter(-1, order, -torch.inf).logsumexp(-1)
    torch.testing.assert_close(says.log_p_BTO[1, :10, K], rest[:10], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(says.log_p_BTO.exp().sum(-1), torch.ones(2, 12))
    assert signal.says.vocabulary == VOCABULARY


def test_documents_end_at_their_last_label() -> None:
    assert learnt_spans([0, 1, 2, 0, 1, 0], [-100, 5, -100, -100, 6, -100]) == [(0, 2), (3, 5)]
    assert learnt_spans([0, 1], [7, -100]) == [], "a first token is predicted by nothing"


def test_a_certain_teacher_leaves_no_infinity() -> None:
    assert rest_of([0.0, -9999.0]) == rest_of([1e-7]) == -80.0
    assert rest_of([-1.0, -2.0]) == pytest.approx(torch.tensor(1 - 0.36788 - 0.13534).log().item(), rel=1e-4)


def one_wrong(number: int, answer: Any) -> tuple[int, Any]:
    """One token fewer than was asked for, in one place of the first answer."""
    if number == 1:
        place = answer["choices"][0]["prompt_logprobs"][2]
        for token in list(place)[: len(place) - K + 1]:
            del place[token]
    return 200, answer


@pytest.mark.parametrize(
    "spoil",
    [
        once(500, {"error": {"message": "out of memory"}}),
        once(503, b"<html>busy</html>"),
        once(429, {"error": {"message": "too many requests"}}),
        once(200, b'{"choices": [{"prompt_logpr'),
        once(200, {"choices": []}),
        once(200, {"choices": [{"prompt_logprobs": [None, {"1": {}}]}]}),
        once(200, {"choices": [{"prompt_logprobs": [None, {"1": {"logprob": -0.5}}]}]}),
        one_wrong,
        late(1.0),
    ],
    ids=["500", "503", "429", "cut", "empty", "no-number", "few-places", "few-tokens", "late"],
)
def test_what_may_pass_is_asked_again(spoil: Any, served: Any) -> None:
    url, teacher = served
    prompt = [5, 6, 7, 8]
    right = completions(url).likeliest(prompt)
    teacher.prompts.clear()
    teacher.spoil = spoil
    timeout = 0.3 if "late" in getattr(spoil, "__qualname__", "") else 20.0
    assert completions(url, timeout_s=timeout).likeliest(prompt) == right
    assert teacher.prompts == [prompt, prompt]
    teacher.prompts.clear()
    with pytest.raises(RunError, match=r"log-probabilities from tiny.*\(1 attempts in"):
        completions(url, timeout_s=timeout, retries=0).likeliest(prompt)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (once(400, {"error": {"message": "prompt_logprobs of 8, max is 5"}}), "status 400: .*max is 5"),
        (once(401, b"no key"), "status 401: no key"),
        (once(200, {"choices": [{"text": "an answer"}]}), "without prompt_logprobs"),
    ],
)
def test_what_will_not_pass_is_not_asked_again(spoil: Any, said: str, served: Any) -> None:
    url, teacher = served
    teacher.spoil = spoil
    with pytest.raises(RunError, match=said):
        completions(url).likeliest([5, 6, 7])
    assert len(teacher.prompts) == 1


def test_an_id_that_the_student_lacks_ends_the_run(served: Any) -> None:
    url, teacher = served

    def other(number: int, answer: Any) -> tuple[int, Any]:
        place = answer["choices"][0]["prompt_logprobs"][1]
        place[str(VOCABULARY)] = place.pop(next(iter(place)))
        return 200, answer

    teacher.spoil = other
    with pytest.raises(RunError, match=f"token id {VOCABULARY}, where the student has {VOCABULARY}"):
        completions(url).likeliest([5, 6, 7])
    assert len(teacher.prompts) == 1


def lost(stage: Distill, teacher: Teacher, lives: int, *where: Any) -> str:
    """What a run says whose server falls silent after so many answers; it speaks again afterwards."""
    teacher.prompts.clear()
    teacher.lives = lives
    with pytest.raises(RunError, match=r"\(3 attempts in") as caught:
        run(stage, *where)
    teacher.lives = None
    return str(caught.value)


def require_same(whole: Path, resumed: Path) -> None:
    """The same losses, evaluations and weights, bit for bit."""
    for place in (whole, resumed):
        assert len(losses(place / "scratch")) == FEW["steps"]
    kept = [
        [(r["step"], r.get("loss"), r.get("validation_loss")) for r in LossLog(path).read()]
        for path in (place / "scratch" / "losses.jsonl" for place in (whole, resumed))
    ]
    assert kept[0] == kept[1]
    one, two = (load_file(place / "out" / "model.safetensors") for place in (whole, resumed))
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize(
    ("changes", "step"),
    [
        ({"checkpoint_every": 0, "on_policy": {"fraction": 0.5, "max_new_tokens": 4}}, 3),
        ({"checkpoint_every": 2}, 3),
        ({"checkpoint_every": 0}, 6),
    ],
    ids=["no checkpoint asked for", "every second", "in the last evaluation"],
)
def test_a_lost_server_leaves_a_checkpoint_of_all_steps_that_were_done(
    changes: dict[str, Any], step: int, served: Any, tmp_path: Path, text: DataSpec
) -> None:
    """In the last of several passes, in each of which dropout draws: a restart draws the same numbers."""
    url, teacher = served
    source = open_model(str(tiny_llama(tmp_path / "student", attention_dropout=0.2)))
    few = FEW | {"micro_batch_size": 1, "eval_every": 0} | changes
    stage = Distill(teacher_placement=placement(url), **few)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    asked: list[int] = []

    def watch(number: int, answer: Any) -> tuple[int, Any]:
        if len(losses(whole / "scratch")) == step:
            asked.append(number)
        return 200, answer

    teacher.spoil = watch
    result, _ = run(stage, source, text, whole)
    teacher.spoil = lambda number, answer: (200, answer)
    said = lost(stage, teacher, max(asked) - 1, source, text, broken)
    assert len(losses(broken / "scratch")) == step
    assert f"The same command continues at the checkpoint of step {step} of 6." in said
    kept = {path.name for path in (broken / "scratch" / "checkpoints").iterdir()}
    assert kept - {f"checkpoint-{step - 1}"} == {f"checkpoint-{step}"}
    again = rerun(stage, source, text, broken)
    assert json.loads((broken / "scratch" / "record.json").read_text())["resumed_from"] == step
    assert again.metrics["validation_loss"] == result.metrics["validation_loss"]
    require_same(whole, broken)


def test_an_evaluation_that_lost_its_server_is_made_up_for(
    served: Any, source: ModelSource, text: DataSpec, tmp_path: Path
) -> None:
    """Else the weights of the best evaluation would be others."""
    url, teacher = served
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    stage = Distill(teacher_placement=placement(url), **FEW | {"eval_every": 2, "keep_best": True})
    evaluating: list[int] = []

    def watch(number: int, answer: Any) -> tuple[int, Any]:
        log = LossLog(whole / "scratch" / "losses.jsonl").read()
        if [r["step"] for r in log if "validation_loss" in r] == [0, 2] and log[-1]["step"] == 4:
            evaluating.append(number)
        return 200, answer

    teacher.spoil = watch
    run(stage, source, text, whole)
    teacher.spoil = lambda number, answer: (200, answer)
    assert len(evaluating) > 1
    said = lost(stage, teacher, evaluating[1], source, text, broken)
    assert "The same command continues at the checkpoint of step 4 of 6." in said
    rerun(stage, source, text, broken)
    require_same(whole, broken)


def rerun(stage: Distill, source: ModelSource, text: DataSpec, place: Path) -> StageResult:
    context = StageContext(
        out=place / "out",
        scratch=place / "scratch",
        data=text,
        original=source.directory,
        cache=place / "cache",
        device="cpu",
    )
    return stage.run(source, context)


def test_a_stop_before_the_first_step_says_so(
    served: Any, source: ModelSource, text: DataSpec, tmp_path: Path
) -> None:
    url, teacher = served
    teacher.lives = 0
    with pytest.raises(RunError, match="No step was finished yet"):
        run(Distill(teacher_placement=placement(url), **FEW), source, text, tmp_path / "s")


def test_the_key_is_sent_and_never_written(
    served: Any, source: ModelSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, teacher = served
    asked = placement(url, api_key_env="TEACHERS_KEY")
    monkeypatch.delenv("TEACHERS_KEY", raising=False)
    (fault,) = faults(source, asked)
    assert fault.where == f"{WHERE}.api_key_env"
    monkeypatch.setenv("TEACHERS_KEY", "abc")
    assert faults(source, asked) == []
    assert set(teacher.keys) == {"Bearer abc"}


def test_what_a_server_cannot_say_is_refused_before_it_is_asked(served: Any, source: ModelSource) -> None:
    url, teacher = served
    loss = ({"method": "forward_kl", "top_k": 4}, "reverse_kl")
    asked = placement("localhost:8000", top_k=VOCABULARY + 1)
    found = faults(source, asked, features="hidden_mse", temperature=2.0, loss=loss)
    assert [fault.where for fault in found] == [
        f"{WHERE}.url",
        f"{WHERE}.top_k",
        WHERE,
        WHERE,
        f"{WHERE}.top_k",
    ]
    assert "Leave features out" in found[2].cure
    assert "Set temperature to 1" in found[3].cure
    assert "Leave top_k out of the loss" in found[4].cure
    assert teacher.prompts == []
    assert [f.where for f in faults(source, {"method": "server", "url": url})] == [WHERE]
    assert faults(source, placement(url), loss={"method": "forward_kl", "top_k": K}) == []


def test_other_processes_must_be_able_to_wait_for_a_lost_server(source: ModelSource) -> None:
    """Three attempts of 290 s, and waits of 10 and 20 s between them: half as long as processes wait."""
    there = {"backoff_s": 10.0, "timeout_s": 290.0}
    asked = placement("http://127.0.0.1:9/v1", **there)
    (fault,) = faults(source, asked, processes=2)
    assert fault.where == f"{WHERE}.retries"
    assert "900 s" in fault.expected
    assert "900 s" in fault.got
    assert patience_s(1.0, 8, 1.0) == 9 + 1 + 2 + 4 + 8 + 16 + 32 + 60 + 60
    assert patience_s(1.0, 10**9, 1.0) > 60e9, "and at once"
    for fewer, processes in (({**there, "timeout_s": 289.0}, 2), (there, 1)):
        (fault,) = faults(source, placement("http://127.0.0.1:9/v1", **fewer), processes=processes)
        assert fault.where == f"{WHERE}.url", "only that nobody is there"


def test_what_the_server_lacks_is_told_at_plan_time(served: Any, source: ModelSource) -> None:
    url, teacher = served
    (fault,) = faults(source, placement(url, model="other"))
    assert (fault.where, fault.got) == (f"{WHERE}.model", NAME)
    (fault,) = faults(source, placement("http://127.0.0.1:9/v1"))
    assert fault.where == f"{WHERE}.url"
    assert "refused" in fault.got
    (fault,) = faults(source, placement(url.removesuffix("/v1")))
    assert fault.where == f"{WHERE}.url"
    (fault,) = faults(source, placement(url), context_length=128)
    assert "--max-model-len 129" in fault.cure
    teacher.prompts.clear()
    teacher.spoil = once(400, {"message": "prompt_logprobs: at most 5"})
    (fault,) = faults(source, placement(url))
    assert "at most 5" in fault.got
    assert "--max-logprobs" in fault.cure
    assert len(teacher.prompts) == 1, "one small request, not repeated"
    assert len(teacher.prompts[0]) == 16


def test_another_vocabulary_is_told_at_plan_time(served: Any, source: ModelSource) -> None:
    url, teacher = served
    tokenizer = copy.deepcopy(teacher.tokenizer)

    class Shifted:
        def decode(self, ids: list[int]) -> str:
            return str(tokenizer.decode([(ids[0] + 1) % 200]))

    teacher.tokenizer = Shifted()
    (fault,) = faults(source, placement(url))
    assert "tokens that differ (student and server)" in fault.got
