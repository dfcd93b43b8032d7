"""The key-value store through which the ranks of one attempt find each other."""

import socket

from torch.distributed import TCPStore


def host_store(address: str) -> TCPStore:
    """Serve a store on a free port of `address` alone; the port is `store.port`.

    The socket is bound before the port is told to anybody, so no other process can take it in between. The ranks
    join with `init_method="env://"` and TORCHELASTIC_USE_AGENT_STORE=True, which makes all of them clients. The
    store lives as long as the returned object.
    """
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.bind((address, 0))
    listener.listen(1024)
    port = listener.getsockname()[1]
    return TCPStore(
        address, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach(), use_libuv=True
    )
