"""What the crash test kills in the place of an S3 server: a TCP proxy in front of it, in a process of its own.

    python proxy.py PORT URL

moto keeps its objects in memory, and a real service is not ours to kill: so it is this process that gets kill -9.
For the ZEO server that is the same as the death of an S3 server which keeps what it has acknowledged: all connections
break at once, in the middle of whatever was said, and new ones are refused. A request that had arrived whole may have
been done or not, and its answer is lost; of one that had not, nothing stays.

Each chunk is delayed by some milliseconds, so that requests take long enough to be hit. Prints a line when it listens.
For an https URL it speaks TLS to the service and plain HTTP to the ZEO server.
"""

import random
import socket
import ssl
import sys
import threading
import time
from urllib.parse import urlsplit

CHUNK = 1 << 16
DELAY = 0.004  # seconds, at most


def pump(source, target):
    """Pass on what comes from ``source`` to ``target`` until one of them is closed."""
    try:
        while chunk := source.recv(CHUNK):
            time.sleep(random.uniform(0, DELAY))
            target.sendall(chunk)
    except OSError:
        pass  # one of the two has gone
    finally:
        for end in source, target:
            try:
                end.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass  # it has gone


def serve(client, url):
    """One connection, from its beginning to its end."""
    with client:
        try:
            service = socket.create_connection((url.hostname, url.port or (443 if url.scheme == "https" else 80)))
        except OSError:
            return  # and so the client sees that there is nobody
        with service:
            if url.scheme == "https":
                service = ssl.create_default_context().wrap_socket(service, server_hostname=url.hostname)
            for end in client, service:
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            answers = threading.Thread(target=pump, args=(service, client), daemon=True)
            answers.start()
            pump(client, service)
            answers.join()


def main():
    port, url = int(sys.argv[1]), urlsplit(sys.argv[2])
    with socket.create_server(("127.0.0.1", port)) as listener:
        print("listening", flush=True)
        while True:
            client, _ = listener.accept()
            threading.Thread(target=serve, args=(client, url), daemon=True).start()


if __name__ == "__main__":
    main()
