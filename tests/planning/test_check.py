"""The check itself: what is exact is exact, a wrong prediction is seen, and bytes on the wire are those of the sockets."""

from __future__ import annotations

import dataclasses
import socket
import threading

import pytest
import torch
from round_device import plain_device

from qtrain.planning import check
from qtrain.planning.check import MODELS, RECIPES, Row
from qtrain.planning.check_wire import sent_bytes
from qtrain.planning.compiled import compiled_blocks


def test_a_wrong_number_that_must_be_exact_fails_the_check() -> None:
    right = Row("a", "parameters", 4, 4, "bytes", exact=True)
    wrong = dataclasses.replace(right, predicted=5)
    assert check.exact([right, Row("a", "step", 1.0, 2.0, "s")])
    assert not check.exact([right, wrong])
    text = check.table([right, wrong, Row("b", "step", 0.001, 0.002, "s")])
    assert "| 4 | 4 | exact |" in text
    assert "+25.0% WRONG" in text
    assert "| 1.00 ms | 2.00 ms | -50.0% |" in text
    assert check.as_numbers([wrong])[0]["error"] == 0.25


def test_memory_of_a_model_under_a_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "RECIPES", {"none": RECIPES["none"]})
    rows = list(check.rows_of_memory(plain_device("cpu"), ["gpt"], timed=False))
    assert check.exact(rows)
    kept = next(row for row in rows if row.what == "kept for the backward")
    assert abs(kept.error) < 0.002


def test_a_compiled_block_keeps_what_the_compiler_says() -> None:
    config = dataclasses.replace(MODELS["llama"], layers=1)
    found = compiled_blocks(config, RECIPES["none"], tokens=check.TOKENS, dtype=torch.bfloat16)
    measured = check.compiled_block_bytes(config, RECIPES["none"])
    assert found[0].at(check.SEQUENCES * check.TOKENS) == pytest.approx(measured, rel=0.002)


def test_the_kernel_counts_what_a_socket_sent() -> None:
    server = socket.create_server(("127.0.0.1", 0))
    received = bytearray()

    def read() -> None:
        connection, _ = server.accept()
        with connection:
            while part := connection.recv(1 << 16):
                received.extend(part)

    reader = threading.Thread(target=read)
    reader.start()
    with socket.create_connection(server.getsockname()) as client:
        before = sent_bytes()
        client.sendall(bytes(100_000))
        client.shutdown(socket.SHUT_WR)
        reader.join()
        assert sent_bytes() - before in (100_000, 100_001)  # the end of the stream counts as one
    server.close()
    assert len(received) == 100_000


def test_bytes_on_the_wire(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes that train with gloo: what the plan says, to a percent (barriers and headers are in the measurement)."""
    small = dataclasses.replace(MODELS["llama"], layers=2, vocab_size=100)
    monkeypatch.setattr(check, "MODELS", {"llama": small})
    rows = {row.point.split(",")[1].strip(): row for row in check.rows_of_wire(plain_device("cpu"))}
    assert set(rows) == {"ddp", "fsdp2"}
    for row in rows.values():
        assert abs(row.error) < 0.01, row


def test_published_layers_are_within_their_stated_errors() -> None:
    """kernels/README.md's table, predicted from rates of other measurements: bf16 within 10 %, int8 within 20 %."""
    from pathlib import Path

    import yaml

    from qtrain.planning.devices import Device
    from qtrain.planning.published import rows

    file = Path(__file__).parents[2] / "configs" / "hardware" / "h200.yaml"
    found = {
        what: predicted / measured - 1
        for what, predicted, measured in rows(Device.of(yaml.safe_load(file.read_text())))
    }
    assert abs(found["bf16, the sum of four"]) < 0.1
    assert abs(found["native int8, the sum of four"]) < 0.2
    assert abs(found["native fp8, 4096 -> 12288, later GEMMs"]) < 0.1
