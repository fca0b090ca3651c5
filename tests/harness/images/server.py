"""A sentence-embedding server: the model in MODEL_DIR, one JSON answer per GET (?text=...) or POST (the text), on PORT.

The answer carries what a test needs to tell a continued process from a new one: `boot`, drawn once when the process
starts, and `n`, the requests it has answered. `sha256` is taken over all numbers of the embedding, bit by bit.
"""

import hashlib
import json
import os
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock
from urllib.parse import parse_qs, urlsplit

STARTED = time.monotonic()

import torch  # noqa: E402  the slow part: it belongs into the measured time
from transformers import AutoModel, AutoTokenizer  # noqa: E402

MODEL_DIR = os.environ.get("MODEL_DIR", "/data")
PORT = int(os.environ.get("PORT", "8000"))
BOOT = os.urandom(8).hex()
# Fixed: the order in which numbers are added depends on how many threads add them, and with it the last bits.
torch.set_num_threads(int(os.environ.get("THREADS", "2")))


class Embedder:
    def __init__(self, folder):
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModel.from_pretrained(folder).eval()

    @torch.no_grad()
    def __call__(self, text):
        tokens = self.tokenizer([text], return_tensors="pt", truncation=True)
        words = self.model(**tokens).last_hidden_state[0]
        return torch.nn.functional.normalize(words.mean(dim=0), dim=0)


class Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    answered = 0
    lock = Lock()

    def do_GET(self):
        self.embed(parse_qs(urlsplit(self.path).query).get("text", ["hello world"])[0])

    def do_POST(self):
        self.embed(self.rfile.read(int(self.headers.get("Content-Length", "0"))).decode())

    def embed(self, text):
        vector = embed(text)
        with Answer.lock:
            Answer.answered += 1
            n = Answer.answered
        body = {
            "n": n,
            "boot": BOOT,
            "pid": os.getpid(),
            "dimensions": len(vector),
            "vector": [round(value, 6) for value in vector[:8].tolist()],
            "sha256": hashlib.sha256(vector.numpy().tobytes()).hexdigest(),
        }
        body = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


embed = Embedder(MODEL_DIR)
embed("the first sentence pays for lazy initialisation")
print(f"ready after {time.monotonic() - STARTED:.2f} s on port {PORT}", flush=True)
ThreadingHTTPServer(("0.0.0.0", PORT), Answer).serve_forever()
