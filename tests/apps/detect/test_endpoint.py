"""The judge behind an endpoint: how answers are read, and what happens when the server is not well."""

from __future__ import annotations

import logging
import time

import numpy as np
import pytest
from judge_server import JudgeServer, Reply, chat, completion

from versatune_ds.apps.detect import endpoint
from versatune_ds.apps.detect.endpoint import (
    EndpointJudge,
    Position,
    candidates,
    pause_s,
    read_names,
    retry_after_s,
)
from versatune_ds.config.detection import Endpoint, JudgeSettings
from versatune_ds.foundations.errors import ConfigError, VersaTuneError

NAMES = ["law", "medicine", "code"]
GOOD = chat({"law": 0.6, " Medicine": 0.2, "med": 0.1, "I": 0.1})
BY_HAND = [0.6 / 0.9, 0.3 / 0.9, 0.0]


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(endpoint, "FIRST_PAUSE_S", 0.01)


def judge_texts(answer, texts=1, names=NAMES, **settings):
    """(judgements by index, server, judge) of a server that answers by `answer`."""
    settings = {"model": "judge", "timeout_s": 5, "retries": 3, **settings}
    with JudgeServer(answer) as server:
        judge = EndpointJudge(names, Endpoint(url=server.url, **settings))
        try:
            found = {j.index: j for j in judge.judge([(i, f"text number {i}") for i in range(texts)])}
        finally:
            judge.close()
    return found, server, judge


# --- reading ------------------------------------------------------------------------------------------------


def logs(**tokens):
    return {token.replace("_", " "): float(np.log(p)) for token, p in tokens.items()}


@pytest.mark.parametrize(
    ("names", "answer", "expected"),
    [
        # spaces, case and marks do not matter; what begins no name counts for none
        (["law", "code"], [logs(law=0.5, _Law=0.2, LAW=0.1, Co=0.1, the=0.1)], [0.8, 0.1]),
        # names that begin alike: the next position splits the mass of the chosen path
        (
            ["biology", "biochemistry", "law"],
            [logs(bio=0.8, law=0.2), logs(logy=0.75, chem=0.25), logs(x=1.0)],
            [0.6, 0.2, 0.2],
        ),
        # a mark in front: the answer begins behind it
        (["law", "code"], [logs(**{"**": 0.9, "code": 0.1}), logs(law=1.0)], [0.9, 0.1]),
        # a name that another one begins with: ends decide
        (["law", "law school"], [logs(law=1.0), {"<end>": np.log(0.7), " school": np.log(0.3)}], [0.7, 0.3]),
        (["law", "lawn"], [logs(law=1.0)], [1.0, 0.0]),
        # ambiguous but not chosen: nobody's
        (["biology", "biochemistry", "law"], [logs(law=0.6, bio=0.4)], [0.0, 0.0, 0.6]),
        (["social science", "law"], [logs(social=0.9, law=0.1)], [0.9, 0.1]),
    ],
)
def test_probabilities_of_names_by_hand(names, answer, expected):
    masses = read_names([Position(next(iter(tokens)), tokens) for tokens in answer], names)
    assert masses == pytest.approx(expected)


def test_candidates_need_a_boundary_behind_a_whole_name():
    names = ["law", "lawn"]
    assert candidates("law.", names) == [0] and candidates("lawful", names) == []
    assert candidates("la", names) == candidates("law", names) == candidates(" ", names) == [0, 1]


def test_both_apis_give_the_same_and_ask_for_what_they_need():
    for api, reply in (("chat", GOOD), ("completions", completion({"law": 0.6, " medicine": 0.3, "x": 0.1}))):
        found, server, _ = judge_texts(lambda text, n, reply=reply: reply, api=api, top_logprobs=7)
        np.testing.assert_allclose(found[0].probabilities, BY_HAND)
        assert found[0].name_mass == pytest.approx(0.9)
        (request,) = server.requests
        assert request["model"] == "judge" and request["temperature"] == 0
        assert request["path"].endswith("/chat/completions" if api == "chat" else "/v1/completions")
        assert request["top_logprobs" if api == "chat" else "logprobs"] == 7
        asked = request["messages"][0]["content"] if api == "chat" else request["prompt"]
        assert "text number 0" in asked and "law, medicine, code" in asked


# --- faults that pass ---------------------------------------------------------------------------------------

FAULTS = {
    "busy": Reply(b"slow down", 429),
    "broken": Reply(b"oh", 500),
    "unavailable": Reply(b"", 503, {"Retry-After": "0"}),
    "garbage": Reply(b"<html>hello</html>"),
    "not an answer": Reply(b'{"choices": []}'),
    "a list": Reply(b"[1, 2]"),
    "half of the JSON": Reply(GOOD.body[:70]),
    "half of the bytes": Reply(GOOD.body, cut_at=70),
    "no bytes": Reply(GOOD.body, cut_at=0),
    "strange logprobs": Reply(b'{"choices": [{"logprobs": {"content": [{"top_logprobs": 3}]}}]}'),
    "slow": Reply(GOOD.body, delay_s=0.6),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_that_passes_costs_time_only(fault):
    found, server, judge = judge_texts(lambda _, n: FAULTS[fault] if n == 0 else GOOD, timeout_s=0.3)
    np.testing.assert_allclose(found[0].probabilities, BY_HAND)
    assert len(server.requests) == 2 and judge.facts()["repeated_requests"] == 1


@pytest.mark.parametrize("fault", ["busy", "garbage", "half of the bytes", "slow"])
def test_a_fault_that_stays_is_an_error_with_its_reason(fault):
    words = {
        "busy": "status 429.*slow down",
        "garbage": "not an answer.*html",
        "slow": "no answer within 0.2 s",
    }
    with pytest.raises(VersaTuneError, match=words.get(fault, "RemoteProtocolError")) as caught:
        judge_texts(lambda *_: FAULTS[fault], retries=2, timeout_s=0.2)
    assert "3 attempt(s)" in str(caught.value) and "kept" in str(caught.value)


def test_a_server_that_is_down_is_an_error_that_names_it():
    with JudgeServer(lambda *_: GOOD) as server:
        url = server.url
    judge = EndpointJudge(NAMES, Endpoint(url=url, model="judge", retries=1))
    with pytest.raises(VersaTuneError, match=f"{url}/chat/completions: ConnectError"):
        list(judge.judge([(0, "text")]))
    judge.close()


def test_judgements_before_an_error_are_kept():
    with JudgeServer(lambda text, _: Reply(b"", 500) if "number 3" in text else GOOD) as server:
        judge_one = EndpointJudge(NAMES, Endpoint(url=server.url, model="j", retries=0, concurrency=1))
        kept = []
        with pytest.raises(VersaTuneError):
            kept.extend(judge_one.judge([(i, f"text number {i}") for i in range(3)]))
            for judgement in judge_one.judge([(i, f"text number {i}") for i in range(3, 6)]):
                kept.append(judgement)
        judge_one.close()
    indices = {judgement.index for judgement in kept}
    assert indices >= {0, 1, 2} and 3 not in indices


def test_a_refusal_ends_at_once():
    for status in (400, 401, 404, 301):
        requests = []

        def refuse(text, number, status=status, requests=requests):
            requests.append(number)
            return Reply(b"no such model", status)

        with pytest.raises(ConfigError, match=f"status {status}: 'no such model'"):
            judge_texts(refuse)
        assert requests == [0]


@pytest.mark.parametrize(
    "body",
    [
        b'{"choices": [{"message": {"content": "law"}}]}',
        b'{"choices": [{"message": {"content": "law"}, "logprobs": null}]}',
        b'{"choices": [{"logprobs": {"content": [{"token": "law", "logprob": -0.1}]}}]}',
    ],
)
def test_a_server_without_log_probabilities_is_refused(body):
    with pytest.raises(ConfigError, match=r"without log-probabilities.*vLLM"):
        judge_texts(lambda *_: Reply(body))


def test_an_answer_that_is_no_name_is_a_judgement_without_probabilities():
    found, _, _ = judge_texts(lambda *_: chat({"I": 0.7, "law": 0.3}, {" think": 1.0}))
    assert found[0].probabilities is None and found[0].name_mass == pytest.approx(0.3)
    assert "30.0%" in found[0].problem and "'I think'" in found[0].problem


# --- pace ---------------------------------------------------------------------------------------------------


def test_no_more_requests_than_allowed_at_once():
    def slowly(*_):
        time.sleep(0.03)
        return GOOD

    found, server, _ = judge_texts(slowly, texts=12, concurrency=3)
    assert sorted(found) == list(range(12)) and 1 < server.most_at_once <= 3


def test_pauses_double_obey_retry_after_and_have_a_limit(monkeypatch):
    monkeypatch.setattr(endpoint, "FIRST_PAUSE_S", 0.5)
    assert 0.375 <= pause_s(0, None) <= 0.625 and 3 <= pause_s(3, None) <= 5
    assert pause_s(0, 7.0) == 7.0 and pause_s(0, 1e6) == pause_s(30, None) == endpoint.LONGEST_PAUSE_S
    assert retry_after_s("3") == 3.0 and retry_after_s(None) is retry_after_s("soon") is None
    assert retry_after_s("Wed, 21 Oct 2015 07:28:00 GMT") == 0.0


def test_retry_after_is_waited_for(monkeypatch):
    waited = []
    monkeypatch.setattr(endpoint, "pause_s", lambda attempt, wished: waited.append(wished) or 0.0)
    judge_texts(lambda _, n: Reply(b"", 429, {"Retry-After": "11"}) if n == 0 else GOOD)
    assert waited == [11.0]


# --- the key ------------------------------------------------------------------------------------------------


def test_the_key_is_sent_and_shown_nowhere(monkeypatch, caplog):
    monkeypatch.setenv("JUDGE_KEY", "s3cr3t-k3y")
    caplog.set_level(logging.DEBUG)
    logging.getLogger("versatune_ds").addHandler(caplog.handler)
    echo = Reply(b'{"error": "bad key s3cr3t-k3y"}', 500)
    try:
        found, server, judge = judge_texts(lambda _, n: echo if n == 0 else GOOD, api_key_env="JUDGE_KEY")
        assert (
            server.headers[0]["Authorization"] == "Bearer s3cr3t-k3y" and found[0].probabilities is not None
        )
        assert "[key]" in caplog.text
        for status in (401, 500):
            with pytest.raises(VersaTuneError) as caught:
                judge_texts(lambda *_, s=status: Reply(echo.body, s), api_key_env="JUDGE_KEY", retries=0)
            assert "s3cr3t" not in str(caught.value) and "[key]" in str(caught.value)
        said, _, _ = judge_texts(lambda *_: chat({"s3cr3t-k3y": 1.0}), api_key_env="JUDGE_KEY")
        assert "s3cr3t" not in said[0].problem
    finally:
        logging.getLogger("versatune_ds").removeHandler(caplog.handler)
    assert "s3cr3t" not in caplog.text + str(judge.identity()) + str(judge.facts())


def test_a_key_that_is_not_set_is_an_error_before_any_request(monkeypatch):
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    with pytest.raises(ConfigError, match="names JUDGE_KEY, which is not set"):
        EndpointJudge(NAMES, Endpoint(url="http://127.0.0.1/v1", model="j", api_key_env="JUDGE_KEY"))


def test_names_that_an_answer_cannot_tell_apart_are_refused():
    with pytest.raises(ConfigError, match="cannot be told apart"):
        EndpointJudge(["Law", "law"], Endpoint(url="http://127.0.0.1/v1", model="j"))


@pytest.mark.parametrize(
    "url", ["localhost:8000/v1", "ftp://host/v1", "http://user:pw@host/v1", "http://host/v1?key=abc"]
)
def test_addresses_that_cannot_be_or_hold_secrets_are_refused(url):
    with pytest.raises(ValueError, match="url") as caught:
        Endpoint(url=url, model="j")
    assert "credentials" in str(caught.value) or "http://HOST" in str(caught.value)


def test_a_judge_names_what_it_needs():
    for kind, missing in (("endpoint", "server"), ("model", "local model")):
        with pytest.raises(ValueError, match=missing):
            JudgeSettings(kind=kind)
