"""Starts `performers` from a process that has already imported the libraries: importing them takes a command most of its time.

    python preloaded.py FOLDER        serves at FOLDER/socket and writes the program FOLDER/performers

That program hands its arguments, folder, environment and streams to the server, which forks: a command still runs in a process
of its own, with nothing in it that another command left. `test_wheel.py` runs commands that start from nothing.
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


def _import_all() -> None:
    import performers

    for name in ("h5py", "matplotlib.pyplot", "pandas", "transformers.models.auto.modeling_auto"):
        importlib.import_module(name)
    for module in pkgutil.walk_packages(performers.__path__, "performers."):
        if not module.name.endswith("__main__") and "triton" not in module.name:
            importlib.import_module(module.name)


def _run(arguments: list[str], folder: str, environment: dict[str, str], streams: list[int]) -> NoReturn:
    from performers.cli import main

    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["performers", *arguments]
    status = 1
    try:
        main()
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _answer(connection: socket.socket) -> NoReturn:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    size, streams, _, _ = socket.recv_fds(connection, 8, 3)
    request = b""
    while len(request) < int.from_bytes(size, "big"):
        request += connection.recv(1 << 20)
    child = os.fork()
    if child == 0:
        _run(*json.loads(request), streams)
    _, status = os.waitpid(child, 0)
    connection.sendall(str(os.waitstatus_to_exitcode(status) % 256).encode())
    os._exit(0)


def _serve(folder: Path) -> NoReturn:
    _import_all()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that answer
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(folder / "socket"))
    listener.listen()
    client = folder / "performers"
    client.write_text(_CLIENT.format(python=sys.executable, address=str(folder / "socket")))
    client.chmod(0o755)
    print("ready", flush=True)
    while True:
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            _answer(connection)
        connection.close()


if __name__ == "__main__":
    _serve(Path(sys.argv[1]))
