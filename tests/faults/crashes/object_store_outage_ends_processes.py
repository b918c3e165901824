"""An object store (store.files = "s3://…") that is out of reach for a moment ends workers and trainers.

botocore's EndpointConnectionError is no OSError, so that neither waits for the store as it waits for a full disk. With
its restarts the run ends. Needs moto[server] and s3fs: pip install 'moto[server]' s3fs.
"""

import logging
import os

import torch

from mgrpo.engine.run.trajectories import Position, read
from mgrpo.engine.run.weights import load_weights, publish_weights
from reproduction import cannot, fault, held

try:
    import boto3
    import s3fs  # noqa: F401
    from moto.server import ThreadedMotoServer
except ImportError as error:
    cannot(str(error))

logging.getLogger("werkzeug").setLevel(logging.ERROR)
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
url = "http://{}:{}".format(*server.get_host_and_port())
os.environ |= {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "y", "AWS_DEFAULT_REGION": "us-east-1"}
os.environ |= {"FSSPEC_S3_ENDPOINT_URL": url, "AWS_ENDPOINT_URL": url}
boto3.client("s3", endpoint_url=url).create_bucket(Bucket="bucket")
root, weights = "s3://bucket/run/weights", {"a": torch.zeros(3)}
published = publish_weights(root, "main", 1, weights)  # an exception here, with the server up, ends with status 2
load_weights(root, *published)
server.stop()
bad = []
for what, act in {
    "publish_weights": lambda: publish_weights(root, "main", 2, weights),
    "load_weights": lambda: load_weights(root, *published),
    "read": lambda: read("s3://bucket/run/trajectories", [Position("main-w-00000.arrow", 0, 0)]),
}.items():
    try:
        act()
    except OSError as error:
        print(f"  {what}: OSError {error}")
    except Exception as error:
        bad.append(f"{what}: {type(error).__module__}.{type(error).__name__}, no OSError")
if bad:
    fault("; ".join(bad))
held("OSError, after which both wait")
