"""The process that has the TPU compiler: it answers one request of `tpu.plan_in_process`."""

import json
import sys

from jaxgpt.planning.plan import answer
from jaxgpt.planning.tpu import RESULT
from jaxgpt.settings import ConfigError


def main() -> int:
    """Answer one request from standard input on standard output."""
    request = json.load(sys.stdin)
    try:
        result = answer(**request)
    except ConfigError as error:
        result = {"error": str(error)}
    print(f"\n{RESULT}{json.dumps(result)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
