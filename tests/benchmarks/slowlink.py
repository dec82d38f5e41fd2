"""A slow link in front of an S3 server: a TCP proxy in a process of its own that adds latency and limits bandwidth.

    python slowlink.py HOST:PORT ROUND_TRIP_SECONDS BYTES_PER_SECOND

prints the port on which it listens, and runs until its standard input closes. The bandwidth is that of the whole link
in each direction, shared by all its connections.
"""

import asyncio
import sys
import time

CHUNK = 64 << 10


class Direction:
    """One direction of the link."""

    def __init__(self, delay, bandwidth):
        self.delay = delay
        self.bandwidth = bandwidth
        self.free_at = 0.0

    def arrival(self, size):
        """When ``size`` bytes that are sent now arrive at the other end."""
        self.free_at = max(self.free_at, time.monotonic()) + size / self.bandwidth
        return self.free_at + self.delay

    async def carry(self, reader, writer):
        under_way = asyncio.Queue(maxsize=64)

        async def deliver():
            while True:
                arrival, data = await under_way.get()
                await asyncio.sleep(max(0, arrival - time.monotonic()))
                if not data:
                    writer.close()
                    return
                writer.write(data)
                await writer.drain()

        delivering = asyncio.ensure_future(deliver())
        try:
            while True:
                data = await reader.read(CHUNK)
                await under_way.put((self.arrival(len(data)), data))
                if not data:
                    break
            await delivering
        except ConnectionError:
            delivering.cancel()
            writer.close()


async def main(target, round_trip, bandwidth):
    host, port = target.split(":")
    up, down = Direction(round_trip / 2, bandwidth), Direction(round_trip / 2, bandwidth)

    async def connect(reader, writer):
        there_reader, there_writer = await asyncio.open_connection(host, int(port))
        await asyncio.gather(up.carry(reader, there_writer), down.carry(there_reader, writer), return_exceptions=True)

    server = await asyncio.start_server(connect, "127.0.0.1", 0, limit=CHUNK)
    print(server.sockets[0].getsockname()[1], flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], float(sys.argv[2]), float(sys.argv[3])))
