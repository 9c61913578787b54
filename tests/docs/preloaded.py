"""Starts `performers` from a process that has already imported the libraries: importing them takes a command most of its time.

    python preloaded.py FOLDER        writes the programs FOLDER/performers and FOLDER/blocks and serves them

These programs hand their arguments, folder, environment and streams to a server, which forks: a command still runs in a process
of its own, with nothing in it that another command left. Where `blocks` begins, no part of performers is imported: a page has to
say so itself. `test_wheel.py` runs commands that start from nothing.
"""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

_CLIENT = """#!{python} -SE
import json, os, socket, sys
connection = socket.socket(socket.AF_UNIX)
connection.connect({address!r})
request = json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
socket.send_fds(connection, [len(request).to_bytes(8, "big")], [0, 1, 2])
connection.sendall(request)
sys.exit(int(connection.recv(8) or 1))
"""


def _import_libraries() -> None:
    for name in ("h5py", "matplotlib.pyplot", "pandas", "transformers.models.auto.modeling_auto", "torch._dynamo"):
        importlib.import_module(name)


def _import_performers() -> None:
    import performers

    for module in pkgutil.walk_packages(performers.__path__, "performers."):
        if not module.name.endswith("__main__") and "triton" not in module.name:
            importlib.import_module(module.name)


def _performers() -> None:
    from performers.cli import main

    main()


def _blocks() -> None:
    from blocks import run_blocks

    run_blocks(Path(sys.argv[1]))


def _run(
    program: Callable[[], None], arguments: list[str], folder: str, environment: dict[str, str], streams: list[int]
) -> NoReturn:
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["performers", *arguments]
    status = 1
    try:
        program()
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _answer(program: Callable[[], None], connection: socket.socket) -> NoReturn:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    size, streams, _, _ = socket.recv_fds(connection, 8, 3)
    request = b""
    while len(request) < int.from_bytes(size, "big"):
        request += connection.recv(1 << 20)
    child = os.fork()
    if child == 0:
        _run(program, *json.loads(request), streams)
    _, status = os.waitpid(child, 0)
    connection.sendall(str(os.waitstatus_to_exitcode(status) % 256).encode())
    os._exit(0)


def _listen(folder: Path, name: str) -> socket.socket:
    """A socket that takes requests from now on, and the program that sends them."""
    address = str(folder / f"{name}.socket")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen()
    client = folder / name
    client.write_text(_CLIENT.format(python=sys.executable, address=address))
    client.chmod(0o755)
    return listener


def _serve(program: Callable[[], None], listener: socket.socket) -> NoReturn:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that answer
    while True:
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            _answer(program, connection)
        connection.close()


def _start(folder: Path) -> NoReturn:
    blocks, performers = _listen(folder, "blocks"), _listen(folder, "performers")
    _import_libraries()
    print("ready", flush=True)
    if os.fork() == 0:
        blocks.close()
        _import_performers()
        _serve(_performers, performers)
    performers.close()
    _serve(_blocks, blocks)


if __name__ == "__main__":
    _start(Path(sys.argv[1]))
