"""One training rank, as a command: `python -I -S chaos_rank.py SOCKET STORE`. It runs in `chaos_server.py`'s fork."""

import json
import os
import socket
import sys

address, store = sys.argv[1:]
with socket.socket(socket.AF_UNIX) as connection:
    connection.connect(address)
    request = json.dumps({"store": store, "environment": dict(os.environ)}).encode()
    socket.send_fds(connection, [request], [1, 2])
    answer = connection.recv(1)
sys.exit(answer[0] if answer else 70)
