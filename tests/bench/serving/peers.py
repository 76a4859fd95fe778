"""Other servers for the same model, each in a virtual environment of its own, made on demand by pip.

torch and numpy come from the project's environment (listed after the peer's own packages), so that all
providers compute with the same build; whatever the server itself needs is the peer's own.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np

from tests.bench.serving.providers import ROOT, Provider

_MODEL = """
import os, json
import numpy as np, torch
from deepseek_ray.models import load
torch.set_num_threads(1)
FOLDER, PORT = os.environ["MODEL"], int(os.environ["PORT"])

def score(rows):
    features = np.array([row["features"] for row in rows])
    sequence = np.array([row["sequence"] for row in rows])
    return MODEL.predict_proba(features, sequence).tolist()
"""

_LITSERVE = (
    _MODEL
    + """
import litserve
class API(litserve.LitAPI):
    def setup(self, device):
        global MODEL
        MODEL = load(FOLDER)
    def decode_request(self, request): return request
    def batch(self, rows): return rows
    def predict(self, rows): return score(rows)
    def unbatch(self, scores): return scores
    def encode_response(self, value): return {"probability": value}
if __name__ == "__main__":
    api = API(max_batch_size=64, batch_timeout=0.001)
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=1)
    server.run(host="127.0.0.1", port=PORT, num_api_servers=1, log_level="error", generate_client_file=False)
"""
)

_BENTOML = (
    _MODEL
    + """
import bentoml
@bentoml.service(workers=1, traffic={"timeout": 30}, metrics={"enabled": False})
class Scorer:
    def __init__(self):
        global MODEL
        MODEL = load(FOLDER)
    @bentoml.api(batchable=True, max_batch_size=64, max_latency_ms=1000, route="/score")
    def score(self, rows: list[dict]) -> list[float]:
        return score(rows)
"""
)

_MLSERVER = (
    _MODEL
    + """
from mlserver import MLModel
from mlserver.types import InferenceResponse, ResponseOutput
class Scorer(MLModel):
    async def load(self):
        global MODEL
        MODEL = load(FOLDER)
        return True
    async def predict(self, payload):
        features, sequence = (np.array(item.data.root).reshape(item.shape) for item in payload.inputs)
        scores = MODEL.predict_proba(features, sequence).tolist()
        out = ResponseOutput(name="probability", shape=[len(scores), 1], datatype="FP64", data=scores)
        return InferenceResponse(model_name=self.name, outputs=[out])
"""
)

_PYTRITON = (
    _MODEL
    + """
from pytriton.decorators import batch
from pytriton.model_config import DynamicBatcher, ModelConfig, Tensor
from pytriton.triton import Triton, TritonConfig
MODEL = load(FOLDER)
@batch
def infer(features, sequence):
    return {"probability": MODEL.predict_proba(features, sequence).reshape(-1, 1)}
config = TritonConfig(
    http_address="127.0.0.1", http_port=PORT, grpc_port=PORT + 1, metrics_port=PORT + 2, allow_metrics=False
)
with Triton(config=config) as triton:
    F, (N, C) = int(os.environ["FEATURES"]), (int(os.environ["EVENTS"]), 6)
    triton.bind(
        model_name="scorer", infer_func=infer,
        inputs=[Tensor(name="features", dtype=np.float64, shape=(F,)),
                Tensor(name="sequence", dtype=np.float64, shape=(N, C))],
        outputs=[Tensor(name="probability", dtype=np.float64, shape=(1,))],
        config=ModelConfig(max_batch_size=64, batcher=DynamicBatcher(max_queue_delay_microseconds=1000)),
    )
    triton.serve()
"""
)

PEERS = {"LitServe": "litserve", "BentoML": "bentoml", "MLServer": "mlserver", "PyTriton": "nvidia-pytriton"}


def make(name: str, folder: Path, model: Path, row: dict[str, list[object]]) -> Provider:
    """A provider for a peer; installs it when its environment is not there yet.

    Args:
        folder: where environments and programs go.
        row: one row of model inputs.

    Raises:
        subprocess.CalledProcessError: pip cannot install it.
    """
    python = _environment(folder / PEERS[name], PEERS[name])
    home = folder / f"{PEERS[name]}-app"
    home.mkdir(exist_ok=True)
    command, path, body = {
        "LitServe": _litserve, "BentoML": _bentoml, "MLServer": _mlserver, "PyTriton": _pytriton,
    }[name](python, home, row)  # fmt: skip
    file = home / "body.json"
    file.write_text(body, encoding="utf-8")
    environment = {
        "MODEL": str(model), "PYTHONPATH": f"{ROOT}:{home}", "PORT": "{port}",
        "FEATURES": str(len(row["features"])), "EVENTS": str(len(row["sequence"])),
        "OMP_NUM_THREADS": "1", "BENTOML_DO_NOT_TRACK": "1",
    }  # fmt: skip
    return Provider(name, command, path, f"vector:{file}", environment)


def _environment(folder: Path, package: str) -> Path:
    python = folder / "bin" / "python"
    done = folder / "complete"
    if not done.exists():
        subprocess.run([_interpreter(package), "-m", "venv", "--clear", str(folder)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "-qq", package], check=True)
        done.touch()
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    shared = folder / "lib" / version / "site-packages" / "zz_project.pth"
    shared.write_text(sysconfig.get_paths()["purelib"] + "\n", encoding="utf-8")  # of this run: a checkout may move
    return python


def _interpreter(package: str) -> str:
    """PyTriton's server brings no interpreter, it loads the system's library: only the system's own python fits it."""
    system = shutil.which(f"python3.{sys.version_info.minor}", path=os.defpath)
    return system if system and package == PEERS["PyTriton"] else sys.executable


Made = tuple[list[str], str, str]


def _litserve(python: Path, home: Path, row: dict[str, list[object]]) -> Made:
    return [str(python), str(_program(home, _LITSERVE))], "/predict", _json(row)


def _bentoml(python: Path, home: Path, row: dict[str, list[object]]) -> Made:
    _program(home, _BENTOML)
    serve = [str(python), "-m", "bentoml", "serve", "program:Scorer", "--working-dir", str(home)]
    return [*serve, "--host", "127.0.0.1", "--port", "{port}"], "/score", _json({"rows": [row]})


def _mlserver(python: Path, home: Path, row: dict[str, list[object]]) -> Made:
    _program(home, _MLSERVER)
    (home / "model-settings.json").write_text(
        _json({"name": "scorer", "implementation": "program.Scorer", "max_batch_size": 64, "max_batch_time": 0.001}),
        encoding="utf-8",
    )
    settings = "export MLSERVER_HTTP_PORT=$PORT MLSERVER_HOST=127.0.0.1 MLSERVER_PARALLEL_WORKERS=0"
    settings += " MLSERVER_GRPC_PORT=$((PORT+1)) MLSERVER_METRICS_PORT=$((PORT+2)) MLSERVER_DEBUG=false"
    command = ["bash", "-c", f"{settings}; exec {python} -m mlserver.cli.main start {home}"]
    return command, "/v2/models/scorer/infer", _tensors(row)


def _pytriton(python: Path, home: Path, row: dict[str, list[object]]) -> Made:
    return [str(python), str(_program(home, _PYTRITON))], "/v2/models/scorer/infer", _tensors(row)


def _program(home: Path, text: str) -> Path:
    file = home / "program.py"
    file.write_text(text, encoding="utf-8")
    return file


def _tensors(row: dict[str, list[object]]) -> str:
    """The V2 inference protocol."""
    inputs = []
    for name, values in row.items():
        array = np.array(values, dtype=np.float64)[None]
        inputs.append({"name": name, "shape": list(array.shape), "datatype": "FP64", "data": array.ravel().tolist()})
    return _json({"inputs": inputs})


def _json(value: object) -> str:
    return json.dumps(value)
