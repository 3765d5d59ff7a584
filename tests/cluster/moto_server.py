"""Run moto's server with the Python of .venv-moto, changed to release the private addresses of terminated instances.

moto 5.2 never releases them, but a host of the tests has the same address whenever its instance is started again.
"""

import sys
from typing import Any

from moto.ec2.models.instances import Instance
from moto.server import main

_terminate = Instance.terminate


def terminate_and_free(instance: Any, *arguments: Any, **options: Any) -> Any:
    """Terminate an instance like moto, and release its addresses like EC2."""
    result = _terminate(instance, *arguments, **options)
    subnet = instance.ec2_backend.get_subnet(instance.subnet_id)
    for address in instance._private_ips:
        subnet.del_subnet_ip(address)
    return result


if __name__ == "__main__":
    Instance.terminate = terminate_and_free
    main(sys.argv[1:])
