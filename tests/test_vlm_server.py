"""A quality judge behind a server: whatever the server does, there is a score, a reason, or one sentence at the end."""

import base64
import io
import math
import socket
import threading

import numpy as np
import pytest
from chat_server import ChatServer, says, token
from PIL import Image

from fashiondpo_pipeline import experts, testing
from fashiondpo_pipeline.errors import UserError
from fashiondpo_pipeline.experts.chat import NoAnswer
from fashiondpo_pipeline.experts.vlm_server import VisionLanguageServer

LN = math.log


def picture(seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (20, 16, 3), dtype=np.uint8))


def rows(count=1):
    return [{"group": f"g{n}", "candidate": 0, "prompt": f"a bag {{{n}}}", "picture": picture(n)} for n in range(count)]


def expert(server, **options):
    made = VisionLanguageServer(server if isinstance(server, str) else server.url, "judge-8b",
                                **{"back_off": 0.001, "timeout": 5.0, **options})
    made.load("cpu", None)
    return made


def asked(script, count=1, **options):
    """(opinions, server, expert) of some rows under a script; a list of answers is given in turn, its last for ever."""
    turns = script if callable(script) else lambda number, body: script[min(number, len(script) - 1)]
    with ChatServer(turns) as server:
        judge = expert(server, **options)
        return experts.ask(judge, rows(count)), server, judge


def refused(script, count=1, **options):
    turns = script if callable(script) else lambda number, body: script[min(number, len(script) - 1)]
    with ChatServer(turns) as server, pytest.raises(UserError) as problem:
        experts.ask(expert(server, **options), rows(count))
    assert "\n" not in str(problem.value)
    return str(problem.value).replace(server.url, "URL"), server


# -- what is asked, and what is made of the answer


def test_the_question_holds_picture_request_levels_and_what_the_answer_should_look_like():
    ((score, reason, reply),), server, _ = asked([says('{"level": 7}')])
    assert (score, reason, reply) == (7.0, None, '{"level": 7}')
    (body,) = server.bodies
    image, text = body["messages"][0]["content"]
    sent = Image.open(io.BytesIO(base64.b64decode(image["image_url"]["url"].removeprefix("data:image/png;base64,"))))
    assert np.array_equal(np.asarray(sent), np.asarray(picture(0)))
    assert "a bag {0}" in text["text"] and "10-Exceptional Quality" in text["text"]
    assert (body["path"], body["model"], body["temperature"], body["logprobs"]) == ("/v1/chat/completions", "judge-8b", 0.0, True)
    assert body["response_format"]["json_schema"]["schema"]["properties"]["level"]["enum"] == list(range(1, 11))
    assert "Authorization" not in server.headers[0] and "authorization" not in server.headers[0]


def test_the_score_is_the_expected_level_of_the_tokens_probabilities():
    tokens = [token("8", **{"8": LN(0.6), "7": LN(0.2), "9": LN(0.1), "I": LN(0.1)})]
    ((score, _, reply),), _, _ = asked([says("8", tokens)])
    assert score == pytest.approx((8 * 0.6 + 7 * 0.2 + 9 * 0.1) / 0.9) and reply == "8"


def test_in_json_the_level_stands_at_its_own_token():
    tokens = [token('{"', **{'{"': 0.0}), token("level", level=0.0), token('":', **{'":': 0.0}), token(" 4", **{" 4": LN(0.5), " 6": LN(0.5)}),
              token("}", **{"}": 0.0})]
    ((score, _, _),), _, _ = asked([says('{"level": 4}', tokens)])
    assert score == pytest.approx(5.0)


def test_a_one_that_may_go_on_to_ten_is_told_apart_by_the_next_token():
    tokens = [token("1", **{"1": LN(0.8), "9": LN(0.2)}), token("0", **{"0": LN(0.75), "</s>": LN(0.25)})]
    ((score, _, _),), _, _ = asked([says("10", tokens)])
    assert score == pytest.approx(1 * 0.8 * 0.25 + 10 * 0.8 * 0.75 + 9 * 0.2)


def test_a_one_that_was_not_said_is_left_out_as_nobody_knows_whether_it_was_ten():
    tokens = [token("9", **{"9": LN(0.6), "8": LN(0.2), "1": LN(0.2)})]
    ((score, _, _),), _, _ = asked([says("9", tokens)])
    assert score == pytest.approx((9 * 0.6 + 8 * 0.2) / 0.8)


def test_levels_without_enough_probability_leave_the_reply_to_be_read():
    tokens = [token("8", **{"8": LN(0.3), "Well": LN(0.7)})]
    ((score, _, _),), _, _ = asked([says("8", tokens)])
    assert score == 8.0
    ((score, _, _),), _, _ = asked([says("8", tokens)], sure=0.2)
    assert score == pytest.approx(8.0)


@pytest.mark.parametrize("logprobs", [[{"token": "8"}], [{"token": "8", "logprob": None, "top_logprobs": []}], "many", [3],
                                      [{"token": "8", "logprob": -1.0, "top_logprobs": [{"logprob": 1}]}]])
def test_a_broken_report_of_probabilities_leaves_the_reply_to_be_read(logprobs):
    ((score, reason, reply),), _, _ = asked([says("8", logprobs)])
    assert (score, reason, reply) == (8.0, None, "8")


def test_a_reply_without_a_level_is_no_score_and_is_kept():
    ((score, reason, reply),), server, _ = asked([says("It is quite nice, between 7 and 8.")])
    assert math.isnan(score) and reason == "the reply names no level" and reply == "It is quite nice, between 7 and 8."
    assert len(server.bodies) == 1  # not asked again until it says something else


@pytest.mark.parametrize(("message", "reason", "reply"), [
    ({"content": None}, "the reply is empty", ""),
    ({"content": [{"type": "text", "text": "no idea"}]}, "the reply names no level", "no idea"),
    ({"content": None, "refusal": "I cannot."}, "the server refused to judge the picture", "I cannot."),
    ({"content": 8}, "the reply is empty", ""),
])
def test_odd_messages_are_no_score(message, reason, reply):
    ((score, why, said),), _, _ = asked([{"choices": [{"message": message}]}])
    assert math.isnan(score) and (why, said) == (reason, reply)


def test_a_very_long_reply_is_kept_cut():
    ((_, _, reply),), _, _ = asked([says("x" * 5000)])
    assert reply == "x" * 2000 + "…"


# -- what the server cannot do


def without(*names):
    """A server that rejects requests with these keys."""
    def script(number, body):
        wrong = [name for name in names if name in body]
        return (400, {}, {"error": {"message": f"unknown field {wrong[0]}"}}) if wrong else says("8")

    return script


def test_a_server_without_json_schema_is_asked_without_it_from_then_on_and_that_is_said_once():
    found, server, judge = asked(without("response_format"), count=4)
    assert [score for score, *_ in found] == [8.0] * 4
    assert ["response_format" in body for body in server.bodies] == [True, False, False, False, False]
    assert all(body["logprobs"] for body in server.bodies)
    assert judge.notes == ["judge-8b is asked without response_format from now on: the server answered 400: unknown field response_format"]


def test_a_server_without_probabilities_gives_the_level_it_says():
    found, server, judge = asked(without("response_format", "logprobs"), count=3)
    assert [score for score, *_ in found] == [8.0] * 3 and len(server.bodies) == 5
    assert judge.notes == ["judge-8b is asked without response_format and logprobs from now on: the server answered 400: unknown field logprobs"]


def test_a_picture_that_the_server_will_not_have_is_no_score_and_costs_the_others_nothing():
    def script(number, body):
        return (400, {}, b"picture too small") if "{0}" in body["messages"][0]["content"][1]["text"] else says("8")

    found, _, judge = asked(script, count=3)
    assert math.isnan(found[0][0]) and found[0][1] == "the server answered 400: picture too small"
    assert [score for score, *_ in found[1:]] == [8.0, 8.0]
    assert judge.notes == [] and judge.wishes == ("response_format", "logprobs")


# -- a server that is unwell


@pytest.mark.parametrize(("trouble", "reason"), [
    ((500, {}, b"oops"), "the server answered 500"),
    ((503, {}, b""), "the server answered 503"),
    ((429, {"retry-after": "0"}, b""), "the server answered 429"),
    ((200, {}, b"<html>proxy</html>"), "the answer is not JSON"),
    ((200, {}, b"\xff\xfe\x00"), "the answer is not JSON"),
    ((200, {}, b"[1, 2]"), "the answer holds no choice"),
    ((200, {}, {"choices": []}), "the answer holds no choice"),
    ((200, {}, {"choices": [{"text": "8"}]}), "the answer's choice holds no message"),
])
def test_trouble_that_passes_costs_a_try_and_trouble_that_stays_is_no_score(trouble, reason):
    found, server, _ = asked([trouble, trouble, says("8")])
    assert found[0][0] == 8.0 and len(server.bodies) == 3
    found, server, _ = asked([trouble], retries=2)
    assert math.isnan(found[0][0]) and found[0][1] == reason
    assert len(server.bodies) == 3  # one and two more, and no other


@pytest.mark.parametrize("how", ["cut", "hang up"])
def test_an_answer_that_is_cut_off_is_asked_for_again(how):
    found, server, _ = asked([(200, {}, says("8"), how), says("8")])
    assert found[0][0] == 8.0 and len(server.bodies) == 2
    found, _, _ = asked([(200, {}, says("8"), how)], retries=1)
    assert math.isnan(found[0][0]) and found[0][1].startswith("the answer was cut off (")


def test_a_server_that_does_not_answer_is_not_waited_for():
    with ChatServer(lambda number, body: server.sleep(30) or says("8")) as server:
        ((score, reason),) = experts.ask(expert(server, timeout=1.0, retries=1), rows())
        assert math.isnan(score) and reason == "no answer within 1 s" and len(server.bodies) == 2


def test_an_answer_that_drips_is_not_waited_for_though_every_drop_is_in_time():
    found, _, _ = asked([(200, {}, says("8" + " " * 500), "drip")], timeout=1.0, retries=0)
    assert math.isnan(found[0][0]) and found[0][1] == "no whole answer within 1 s"


def test_a_head_that_drips_is_not_waited_for_either():
    """The server has hundreds of drops left when it is given up; asked again, it has long enough to answer."""
    found, server, _ = asked([(200, {}, b"", "drip head"), says("8")], timeout=2.0, retries=1)
    assert found[0][0] == 8.0 and len(server.bodies) == 2
    found, _, _ = asked([(200, {}, b"", "drip head")], timeout=0.3, retries=0)
    assert math.isnan(found[0][0]) and found[0][1] == "no answer within 0.3 s"


def test_the_wait_the_server_asks_for_is_kept_within_reason():
    judge = expert("http://127.0.0.1:9/v1", back_off=0.5)
    waits = []
    judge._chat._stopped.wait = waits.append
    answers = iter([(429, "7"), (503, None), (429, "9999999"), (429, "Wed, 21 Oct 2026 07:28:00 GMT")])

    def once(body):
        status, after = next(answers)
        return judge._chat._understood(status, b"", after)

    judge._chat._once = once
    assert math.isnan(experts.ask(judge, rows())[0][0])
    assert waits == [7.0, 1.0, 60.0]  # asked for; doubled from half a second; no longer than a minute


def test_nobody_at_the_address():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: refused
        address = f"http://127.0.0.1:{taken.getsockname()[1]}/v1"
        ((score, reason),) = experts.ask(expert(address, retries=1), rows())
        assert math.isnan(score) and reason.startswith("no connection: ")
        with pytest.raises(UserError) as problem:
            experts.ask(expert(address, retries=0, most_failures=3, in_flight=1), rows(20))
    assert str(problem.value).startswith(f"{address} left 3 questions in a row without an answer (no connection: ")
    assert str(problem.value).endswith("): see that the server is well and run the same command again")


# -- limits


def test_it_stops_after_so_many_failures_in_a_row_and_an_answer_between_them_counts():
    sentence, server = refused([(500, {}, b"")], count=50, retries=0, most_failures=4, in_flight=1)
    assert sentence == ("URL left 4 questions in a row without an answer (the server answered 500): see that the server is well and run the "
                        "same command again")
    assert len(server.bodies) <= 5
    found, _, _ = asked(lambda number, body: says("8") if number % 3 == 0 else (500, {}, b""), count=30, retries=0, most_failures=3, in_flight=1)
    assert sum(score == 8.0 for score, *_ in found) == 10


def test_it_stops_after_as_many_requests_as_it_may_make():
    sentence, server = refused([says("8")], count=50, most_calls=7)
    assert sentence == "URL was asked 7 times, as many as most_calls allows: raise it to go on"
    assert len(server.bodies) == 7
    found, _, _ = asked([says("8")], count=7, most_calls=7)
    assert len(found) == 7


def test_questions_that_come_after_the_stop_are_no_failures_of_the_server():
    judge = expert("http://127.0.0.1:9/v1", most_failures=2)._chat
    judge._stopped.set()
    for _ in range(3):
        with pytest.raises(NoAnswer, match="the scoring was stopped"):
            judge.ask({})
    assert judge.failures == 0


def test_as_many_requests_as_allowed_are_in_flight_and_answers_stand_at_their_row():
    together = threading.Barrier(3, timeout=60)  # each waits until two more are in flight

    def script(number, body):
        together.wait()
        said = int(body["messages"][0]["content"][1]["text"].split("{")[1].split("}")[0])
        return says(str(said % 10 + 1))

    with ChatServer(script) as server:
        found = experts.ask(expert(server, in_flight=3), rows(12))
    assert [score for score, *_ in found] == [n % 10 + 1 for n in range(12)]
    assert server.most == 3


@pytest.mark.parametrize(("status", "said"), [
    (401, "the key is not accepted"), (403, "access is refused"), (404, "there is no such model or address"),
])
def test_what_no_retry_mends_ends_it_at_once(status, said):
    sentence, server = refused([(status, {}, {"error": {"message": "no\nway"}})], count=9)
    assert sentence == f"URL/chat/completions answered {status}, {said} (no way): check base_url, model and key_variable"
    assert len(server.bodies) == 1


# -- options


def test_the_key_comes_from_the_environment_and_stays_there(monkeypatch):
    with pytest.raises(UserError) as problem:
        expert("http://127.0.0.1:9/v1", key_variable="JUDGE_KEY")
    assert str(problem.value) == ("the environment variable JUDGE_KEY, which should hold the key of http://127.0.0.1:9/v1, is not set: "
                                  "export JUDGE_KEY=...")
    monkeypatch.setenv("JUDGE_KEY", "s3cret\n")
    with ChatServer(lambda number, body: (401, {}, b"")) as server, pytest.raises(UserError) as problem:
        experts.ask(expert(server, key_variable="JUDGE_KEY"), rows())
    assert {name.lower(): value for name, value in server.headers[0].items()}["authorization"] == "Bearer s3cret"
    assert "s3cret" not in str(problem.value)


@pytest.mark.parametrize(("options", "sentence"), [
    ({"template": "rate {prompt.__class__}"}, "template: {prompt.__class__} is no column's name; a brace that is meant as one is written twice"),
    ({"template": "rate {0}"}, "template: {0} is no column's name; a brace that is meant as one is written twice"),
    ({"template": "rate {prompt"}, "template: expected '}' before end of string; a brace that is meant as one is written twice"),
    ({"template": "a", "template_file": "b"}, "a vision-language expert takes `template` or `template_file`, not both: drop one"),
    ({"template_file": "none.txt"}, "template_file: there is no file none.txt; check the path (relative ones start in the working folder)"),
    ({"levels": 1}, "levels: should be a whole number from 2 to 10, not 1"),
    ({"levels": 100}, "levels: should be a whole number from 2 to 10, not 100"),
    ({"sure": 0}, "sure: should be a share above 0 and up to 1, not 0"),
])
def test_an_option_that_makes_no_sense_is_told_before_anything_runs(options, sentence):
    with pytest.raises(UserError) as problem:
        VisionLanguageServer("http://127.0.0.1:9/v1", "m", **options)
    assert str(problem.value) == sentence


def test_an_address_that_is_none_is_told():
    with pytest.raises(UserError) as problem:
        experts.ask(expert("localhost:8000/v1"), rows())
    assert str(problem.value).startswith("base_url 'localhost:8000/v1' is no address (")


def test_a_template_of_ones_own_names_the_columns_it_needs(tmp_path):
    (tmp_path / "ask.txt").write_text("Is this a {colour} {category}? {levels}, {{twice}}")
    judge = VisionLanguageServer("http://x/v1", "m", template_file=str(tmp_path / "ask.txt"), levels=5)
    assert judge.needs == ("picture", "colour", "category") and judge.range == (1.0, 5.0)
    assert judge.files() == {"template": tmp_path / "ask.txt"}


def test_it_keeps_the_contract_but_for_being_the_same_twice():
    with ChatServer(lambda number, body: says(str(number % 5 + 3))) as server:
        testing.check_expert(VisionLanguageServer(server.url, "m"), rows(3))
