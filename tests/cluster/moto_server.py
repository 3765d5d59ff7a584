"""moto's server, run by the Python of .venv-moto; an instance that is ended gives its private address back.

moto 5.2 keeps such an address for ever; but a host of the tests, being ended and started again, has always the same.
"""

import sys
from typing import Any

from moto.ec2.models.instances import Instance
from moto.server import main

_terminate = Instance.terminate


def terminate_and_free(instance: Any, *arguments: Any, **options: Any) -> Any:
    """End an instance as moto does, and free its addresses as EC2 does."""
    result = _terminate(instance, *arguments, **options)
    subnet = instance.ec2_backend.get_subnet(instance.subnet_id)
    for address in instance._private_ips:
        subnet.del_subnet_ip(address)
    return result


if __name__ == "__main__":
    Instance.terminate = terminate_and_free
    main(sys.argv[1:])
