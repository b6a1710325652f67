"""Online knowledge: served by number, over broken connections, to those with a token."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from benchmarks.tcp_proxy import Proxy
from knowledge_helpers import ToyTeacher, batches, network, toy_record
from pyarrow import flight

from slimkit.distill.knowledge import (
    Knowledge,
    NetworkTeacher,
    OnlineTeacher,
    Patience,
    Question,
    TeacherServer,
    TLSFiles,
    Trust,
    issue_token,
    serve,
)
from slimkit.distill.knowledge.online.connecting import Connection
from slimkit.errors import ArtifactError, DataError, InputError, TeacherError

QUICK = Patience(answer=2.0, lost=3.0)
SECRET = b"a secret of enough bytes"


@pytest.fixture
def server() -> Iterator[TeacherServer]:
    with serve(ToyTeacher()) as running:
        yield running


def opened(address: str, **options: object) -> OnlineTeacher:
    return OnlineTeacher(address, **{"patience": QUICK, **options})


def test_answers_come_in_the_students_order_and_sizes(server: TeacherServer) -> None:
    teacher = opened(server.address)
    wanted = [*batches(64, 5), np.array([3], np.int64)]
    answers = list(teacher.stream((Question(ids) for ids in wanted), 2, ["logits"]))
    assert [len(answer["logits"]) for answer in answers] == [len(ids) for ids in wanted]
    for ids, answer in zip(wanted, answers, strict=True):
        assert torch.equal(answer["logits"], toy_record(ids, 2, 3))
    sizes = {len(ids) for ids in server.teacher.asked}
    assert sizes <= {8, 1}  # the teacher's own batch size, and what was left


def test_a_network_teacher_says_online_what_it_writes_to_files(
    teacher: NetworkTeacher, tmp_path: Path
) -> None:
    from slimkit.distill.knowledge import KnowledgeFiles, dump

    dump(teacher, tmp_path / "k", passes=2)
    files = KnowledgeFiles(tmp_path / "k")
    with serve(teacher) as running:
        online = opened(running.address)
        ids = teacher.ids[:48]
        (found,) = online.stream([Question(ids)], 1, ["logits"])
        assert torch.equal(found["logits"], files.rows(ids, 1)["logits"])
        with pytest.raises(TeacherError, match="no sample 99999"):
            list(online.stream([Question(np.array([99999]))], 0, ["logits"]))


def test_two_students_do_not_disturb_each_other(teacher: NetworkTeacher) -> None:
    found: dict[int, list[torch.Tensor]] = {}

    def learn(seed: int) -> None:
        online = opened(running.address)
        order = np.random.default_rng(seed).permutation(teacher.ids)
        questions = [Question(ids) for ids in np.array_split(order, 7)]
        parts = [answer["logits"] for answer in online.stream(questions, seed, ["logits"])]
        found[seed] = [torch.cat(parts)[np.argsort(order)]]

    with serve(teacher) as running:
        students = [threading.Thread(target=learn, args=(seed,)) for seed in (0, 1)]
        for student in students:
            student.start()
        for student in students:
            student.join()
    for seed, (logits,) in found.items():
        images = teacher.samples.inputs(teacher.samples.ids, seed)
        expected = network(1).eval()(images).detach()
        torch.testing.assert_close(logits.float(), expected, atol=5e-3, rtol=5e-3)
    assert len(found) == 2


def test_the_student_does_not_ask_for_more_than_it_takes(server: TeacherServer) -> None:
    with Knowledge([server.address], patience=QUICK, prefetch=2) as knowledge:
        stream = knowledge.stream(list(batches(64, 4)), 0)
        next(stream)
        time.sleep(0.5)
        asked = sum(map(len, server.teacher.asked))
        assert asked <= 8 + 4 * 3 + 8 * 3  # taken, queued, and under way
        assert len(list(stream)) == 15
    assert sum(map(len, server.teacher.asked)) == 64


def test_a_teacher_without_samples_is_sent_its_inputs() -> None:
    net = network(1).eval()
    teacher = NetworkTeacher(
        net, example_inputs=torch.zeros(2, 1, 8, 8), dtype="float32", precision="fp32",
        batch_size=4,
    )  # fmt: skip
    images = torch.randn(10, 1, 8, 8)
    with serve(teacher) as running:
        online = opened(running.address)
        question = Question(np.arange(10), {"input": images.numpy()})
        (found,) = online.stream([question], 0, ["logits"])
        with torch.no_grad():
            torch.testing.assert_close(found["logits"], net(images))
        with pytest.raises(TeacherError, match="send the inputs along"):
            list(online.stream([Question(np.arange(3))], 0, ["logits"]))
        wrong = Question(np.arange(3), {"input": np.zeros((3, 1, 9, 9), np.float32)})
        with pytest.raises(DataError, match=r"input is \(3, 1, 9, 9\)"):
            list(online.stream([wrong], 0, ["logits"]))


def test_student_and_teacher_tell_each_other_things(server: TeacherServer) -> None:
    student = opened(server.address, state=lambda about: {"about": about, "epoch": 4})
    student.tell("plan", {"epochs": 5})
    assert server.mail.get("plan", timeout=1) == {"epochs": 5}
    answers: list[object] = []
    asking = threading.Thread(target=lambda: answers.append(server.ask("epoch", timeout=5)))
    asking.start()
    time.sleep(0.1)
    list(student.stream([Question(np.arange(20))], 0, ["logits"]))
    asking.join()
    assert answers == [{"about": "epoch", "epoch": 4}]
    with pytest.raises(InputError, match="value: cannot be told as JSON"):
        student.tell("plan", {1, 2})
    with pytest.raises(TeacherError, match="no student answered"):
        server.ask("epoch", timeout=0.05)


def test_a_token_is_needed_and_ends() -> None:
    with serve(ToyTeacher(), secret=SECRET) as running:
        good = Trust(token=issue_token(SECRET, 60))
        teacher = opened(running.address, trust=good)
        assert teacher.schema == running.teacher.schema
        for token, message in (
            (None, "missing or not of this teacher"),
            (issue_token(b"another secret of enough bytes", 60), "not of this teacher"),
            (issue_token(SECRET, -5), "expired"),
        ):
            with pytest.raises(TeacherError, match=f"{running.address}.*{message}"):
                opened(running.address, trust=Trust(token=token))
    with pytest.raises(InputError, match="can be guessed"):
        issue_token(b"short", 60)
    with pytest.raises(InputError, match="a secret of 0 bytes can be guessed"):
        serve(ToyTeacher(), secret=b"")


def test_a_token_is_read_anew_from_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "token"
    monkeypatch.setenv("SLIMKIT_TOKEN_FILE", str(path))
    path.write_text(issue_token(SECRET, 60) + "\n")
    with serve(ToyTeacher(), secret=SECRET) as running:
        teacher = opened(running.address)
        path.write_text(issue_token(SECRET, -1))
        with pytest.raises(TeacherError, match="expired"):
            list(teacher.stream([Question(np.arange(3))], 0, ["logits"]))
        path.write_text(issue_token(SECRET, 60))
        assert len(list(teacher.stream([Question(np.arange(3))], 0, ["logits"]))) == 1


def certificate(folder: Path, name: str) -> tuple[Path, Path]:
    if shutil.which("openssl") is None:
        pytest.skip("openssl makes the certificate")
    crt, key = folder / f"{name}.crt", folder / f"{name}.key"
    command = [
        "openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1",
        "-nodes", "-days", "2", "-subj", "/CN=localhost", "-addext",
        "subjectAltName=DNS:localhost,IP:127.0.0.1", "-keyout", str(key), "-out", str(crt),
    ]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True)
    return crt, key


def test_tls_knows_the_teacher_and_the_student(tmp_path: Path) -> None:
    crt, key = certificate(tmp_path, "teacher")
    own, own_key = certificate(tmp_path, "student")
    with serve(ToyTeacher(), tls=TLSFiles(crt, key)) as running:
        assert running.address.startswith("grpc+tls://")
        teacher = opened(running.address, trust=Trust(roots=crt))
        assert len(list(teacher.stream([Question(np.arange(3))], 0, ["logits"]))) == 1
        with pytest.raises(TeacherError, match="no answer"):
            opened(running.address, patience=Patience(1.0, 1.0), trust=Trust(roots=own))
        with pytest.raises(ArtifactError, match=r"none\.pem"):
            opened(running.address, trust=Trust(roots=tmp_path / "none.pem"))
    with serve(ToyTeacher(), tls=TLSFiles(crt, key, client_ca=own)) as running:
        with pytest.raises(InputError, match="key: the key that belongs to it is missing"):
            opened(running.address, trust=Trust(roots=crt, certificate=own))
        shown = Trust(roots=crt, certificate=own, key=own_key)
        assert opened(running.address, trust=shown).schema == running.teacher.schema
        with pytest.raises(TeacherError, match="no answer"):
            opened(running.address, patience=Patience(1.0, 1.0), trust=Trust(roots=crt))


def test_a_reachable_address_needs_tls_and_a_secret() -> None:
    with pytest.raises(InputError, match=r"0\.0\.0\.0 can be reached"):
        serve(ToyTeacher(), host="0.0.0.0")
    with serve(ToyTeacher(), host="0.0.0.0", insecure=True):
        pass


def test_an_address_that_does_not_answer_is_named_in_the_stated_time() -> None:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        address = f"grpc://127.0.0.1:{listening.getsockname()[1]}"
        start = time.monotonic()
        with pytest.raises(TeacherError, match=f"{address}: no answer for"):
            opened(address, patience=Patience(answer=0.5, lost=1.0))
        assert time.monotonic() - start < 4
        listening.listen()  # accepts, and never says a word
        with pytest.raises(TeacherError, match=f"{address}: no answer for"):
            opened(address, patience=Patience(answer=0.5, lost=1.0))


def test_a_peer_that_speaks_another_language_is_no_teacher() -> None:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        stop = threading.Event()

        def babble() -> None:
            listening.settimeout(0.1)
            while not stop.is_set():
                try:
                    peer, _ = listening.accept()
                except TimeoutError:
                    continue
                peer.sendall(b"HTTP/1.1 200 OK\r\n\r\n" + bytes(range(256)) * 64)
                peer.close()

        thread = threading.Thread(target=babble)
        thread.start()
        address = f"grpc://127.0.0.1:{listening.getsockname()[1]}"
        with pytest.raises(TeacherError, match=address):
            opened(address, patience=Patience(answer=0.5, lost=1.0))
        stop.set()
        thread.join()


def test_a_taken_port_is_an_error(server: TeacherServer) -> None:
    other = socket.socket()
    other.bind(("127.0.0.1", 0))
    other.listen()
    with pytest.raises(TeacherError, match="cannot listen"):
        serve(ToyTeacher(), port=other.getsockname()[1])
    other.close()


@pytest.mark.parametrize("fault", ["reset", "stall"])
def test_a_broken_or_silent_network_costs_no_sample(server: TeacherServer, fault: str) -> None:
    with Proxy("127.0.0.1", server.port) as proxy:
        patience = Patience(answer=0.6, lost=10.0)
        teacher = opened(f"grpc://127.0.0.1:{proxy.port}", patience=patience)
        wanted = list(batches(64, 4))
        answers = []
        for number, answer in enumerate(
            teacher.stream((Question(ids) for ids in wanted), 0, ["logits"])
        ):
            answers.append(answer["logits"])
            if number in {2, 9}:
                proxy.reset() if fault == "reset" else proxy.stall(1.0)
        for ids, found in zip(wanted, answers, strict=True):
            assert torch.equal(found, toy_record(ids, 0, 3))


def test_what_was_received_before_a_break_is_not_asked_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    toy = ToyTeacher(batch_size=4)
    answer = toy.answer

    def slower(ids: np.ndarray, *rest: object) -> object:
        time.sleep(0.25)  # five of these take longer than one answer may
        return answer(ids, *rest)

    monkeypatch.setattr(toy, "answer", slower)
    with serve(toy) as running:
        connection = Connection(running.address, Trust(), Patience(0.6, 3.0), None)
        ids = np.arange(40)
        found = connection.fetch(Question(ids), 1, ["logits"])
        assert torch.equal(found["logits"], toy_record(ids, 1, 3))


def test_another_teacher_at_the_same_address_is_noticed() -> None:
    first = serve(ToyTeacher())
    port = first.port
    with Knowledge([first.address], patience=QUICK, prefetch=1) as knowledge:
        stream = knowledge.stream(list(batches(20_000, 50)), 0)
        next(stream)
        first.close()
        with (
            serve(ToyTeacher(teacher="someone else"), port=port),
            pytest.raises(TeacherError, match="another teacher answers now: 'someone else'"),
        ):
            list(stream)


def test_another_teacher_is_noticed_without_a_call_that_failed() -> None:
    first = serve(ToyTeacher())
    connection = Connection(first.address, Trust(), QUICK, None)
    connection.fetch(Question(np.arange(3)), 0, ["logits"])
    first.close()
    with serve(ToyTeacher(teacher="someone else"), port=first.port):
        client = connection._connected()
        while True:  # gRPC connects again on its own, and tells nobody
            with contextlib.suppress(flight.FlightUnavailableError):
                list(client.do_action(("describe", b"")))
                break
        with pytest.raises(TeacherError, match="another teacher answers now: 'someone else'"):
            connection.fetch(Question(np.arange(3)), 0, ["logits"])


def test_a_teacher_that_is_gone_for_good_is_named() -> None:
    running = serve(ToyTeacher())
    with Knowledge([running.address], patience=Patience(0.5, 1.0), prefetch=1) as knowledge:
        stream = knowledge.stream(list(batches(20_000, 50)), 0)
        next(stream)
        running.close()
        with pytest.raises(TeacherError, match=f"{running.address}: no answer for"):
            list(stream)
