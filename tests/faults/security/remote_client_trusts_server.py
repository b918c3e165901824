"""The trainer's control client of a vLLM server trusts what the server answers.

It follows redirects to any other host, hands that host the bearer token, and takes its answer for the server's. A body
that is no JSON object ends the trainer (TypeError, RecursionError: only OSError and ValueError are expected of a
server). A body without end is read whole into memory.
"""

import resource
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from mgrpo.engine.inference.vllm.control import ServerControl, each
from reproduction import cannot, fault, held

TOKEN = "THE-TOKEN"
tokens: list[str | None] = []  # that the other host was given


def memory() -> float:
    """Return this process's largest memory so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


class Other(BaseHTTPRequestHandler):
    """Another host, which takes every request."""

    def do_GET(self):
        tokens.append(self.headers.get("Authorization"))
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'{"label": "1/1"}')

    do_POST = do_GET

    def log_message(self, *_):
        pass


class Server(Other):
    """The server, which answers as the script says: a body, "redirect" or "endless"."""

    answer = '{"label": "1/1"}'

    def do_GET(self):
        if self.answer == "redirect":
            self.send_response(302)
            self.send_header("Location", f"http://127.0.0.1:{other.server_port}/x")
            self.end_headers()
            return
        self.send_response(200)
        self.end_headers()
        try:
            if self.answer == "endless":
                self.write_on()
            else:
                self.wfile.write(self.answer.encode())
        except OSError:
            pass  # the client has hung up

    def write_on(self):
        until = time.monotonic() + 4
        while time.monotonic() < until and memory() < begun + 1024:
            self.wfile.write(b" " * (1 << 20))

    do_POST = do_GET


other, server = (ThreadingHTTPServer(("127.0.0.1", 0), kind) for kind in (Other, Server))
for one in (other, server):
    threading.Thread(target=one.serve_forever, daemon=True).start()
control = ServerControl(f"http://127.0.0.1:{server.server_port}", TOKEN, 5.0)
control.look()
if str(control.version) != "1/1":
    cannot(f"a healthy server's label was read as {control.version}")

bad = []
Server.answer = "redirect"
try:
    control.post("/pause")
    bad.append("a redirected POST /pause counts as done")
except (OSError, ValueError) as error:
    print(" ", error)
if any(token and TOKEN in token for token in tokens):
    bad.append(f"another host was given {tokens[0]!r}")
for answer in ("[]", "[" * 100_000):
    Server.answer = answer
    try:
        each(ServerControl.look, [control])
    except (OSError, ValueError) as error:
        print(" ", error)
    except Exception as error:
        bad.append(f"the body {answer[:3]!r}… raises {type(error).__name__} out of `each`, which ends the trainer")
Server.answer, begun = "endless", memory()
try:
    control.look()
except (OSError, ValueError) as error:
    print(" ", error)
if memory() - begun > 200:
    bad.append(f"a body without end: {memory() - begun:.0f} MiB more memory in seconds")
if bad:
    fault("; ".join(bad))
held("redirects refused, bodies bounded and checked")
