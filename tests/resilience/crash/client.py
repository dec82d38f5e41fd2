"""A stock ZEO client of the crash test, in a process of its own: a writer, a reader, or a packer.

    python client.py KIND NUMBER LIFE SEED HOST PORT DIRECTORY

It obeys single bytes on its standard input: ``g`` and it works, ``s`` and it stops at the end of what it is doing and
prints its figures since the last time, one line of JSON. It prints that line once at first, when it is connected. At
the end of its input it ends.

Every blob begins with its token, and all its bytes follow from that: see `content`. A writer has a mapping of its own
in the database, from names to tokens and blobs, and nobody else changes it. What it is about to do and how that ended
is in its journal, a file that survives it: see `allowed`.

Status 3: it has seen what must never be; the last line of its journal says what.
"""

import json
import logging
import os
import random
import select
import sys
import time
from collections import Counter
from pathlib import Path

import transaction
import ZEO
from persistent.mapping import PersistentMapping
from ZEO.Exceptions import ClientDisconnected
from ZODB.blob import Blob
from ZODB.POSException import POSError, POSKeyError

WRONG = 3  # the exit status

#: Names that a writer uses: few, so that blobs are overwritten.
NAMES = [f"name {number}" for number in range(6)]

#: The sizes of blobs, and how many of a hundred are so large: below s3-stage-threshold, above it, and in parts.
SIZES = [((0, 20_000), 70), ((150_000, 600_000), 25), ((5_250_000, 5_300_000), 5)]

#: How often a missing blob is asked for, each time in a transaction of its own: a pack may have come between.
ATTEMPTS = 20


def content(token):
    """The bytes of the blob with this token, whose last part is the number of those that are random."""
    return token.encode() + b"\n" + random.Random(token).randbytes(int(token.rpartition("-")[2]))


def is_whole(data):
    """Whether that is all of a blob that some writer wrote."""
    token = data.partition(b"\n")[0].decode(errors="replace")
    return token.rpartition("-")[2].isdigit() and data == content(token)


def tokens(mapping):
    """The state of a writer: name -> token."""
    return {name: entry["token"] for name, entry in mapping.items()}


def allowed(journal):
    """The states, of which the database must have one, after what the ``journal`` tells of a writer.

    That is one, unless the answer to the last commit was lost, as it is if one of the two is killed: then it is the
    one before it or the one after it, and nothing in between.
    """
    states = [{}]
    for line in journal.read_text().splitlines() if journal.exists() else ():
        entry = json.loads(line)
        if entry["event"] == "try":
            states = [states[0], entry["state"]]
        elif entry["event"] == "committed":
            states = states[-1:]
        elif entry["event"] == "failed":
            states = states[:1]
        elif entry["event"] == "found":
            states = [entry["state"]]
    return states


def connect(address, blob_dir, **options):
    """A database on a stock client, with a blob directory of its own."""
    return ZEO.DB(address, blob_dir=str(blob_dir), wait_timeout=60, min_disconnect_poll=0.05, **options)


class Vetoed(Exception):
    """Of a `Veto`."""


class Veto:
    """Lets a transaction fail at the last moment at which that is possible."""

    def sortKey(self):
        return "~"  # after all storages

    def tpc_vote(self, transaction):
        raise Vetoed()

    def tpc_begin(self, transaction):
        pass

    commit = tpc_abort = abort = tpc_begin


class Client:
    """What all have in common. ``random``: follows from the seed; ``figures``: what was done lately."""

    def __init__(self, kind, number, life, seed, host, port, directory):
        self.name = f"{kind} {number}"
        self.life = life
        self.random = random.Random(f"{seed} {self.name} {life}")
        self.figures = Counter()
        self._journal = os.open(Path(directory, self.name), os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        self.blob_dir = Path(directory, f"blobs of {self.name}, {life}")
        # So small a cache that most blobs are asked for again.
        self.db = connect((host, int(port)), self.blob_dir, blob_cache_size=1_000_000)
        self.manager = transaction.TransactionManager()
        self.connection = self.db.open(self.manager)

    def note(self, event, **more):
        """A line in the journal, written at once."""
        os.write(self._journal, json.dumps({"event": event, **more}).encode() + b"\n")

    def wrong(self, sentence):
        """It has happened."""
        self.note("wrong", sentence=sentence)
        os._exit(WRONG)

    def run(self):
        while True:
            print(json.dumps(self.figures), flush=True)
            self.figures.clear()
            if not os.read(0, 1):
                return
            while not select.select([0], [], [], self.pause())[0]:
                self.manager.abort()
                self.step()
            if not os.read(0, 1):
                return

    def pause(self):
        """How many seconds to wait before the next step."""
        return self.random.uniform(0, 0.02)


class Writer(Client):
    """Commits, overwrites, deletes, undoes, and gives up."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.states = allowed(Path(arguments[-1], self.name))
        self.number = 0
        self.undoable = None  # the description of the last transaction, and the state before it

    def step(self):
        try:
            if len(self.states) > 1:  # not what the client has cached, but what the server says once it is back
                self.db.undoLog(0, 1)
                self.manager.abort()
            mapping = self.connection.root()[self.name]
            state = tokens(mapping)
        except POSError:
            return  # the server has gone
        if state not in self.states:
            self.wrong(f"the database has {state}, and not one of {self.states}")
        if len(self.states) > 1:
            self.note("found", state=state)
            self.states = [state]
        self.number += 1
        work = self.random.choices([self.store, self.delete, self.undo, self.give_up], [60, 12, 16, 12])[0]
        description = f"{self.name} {self.life} {self.number}"
        self.manager.get().note(description)
        try:
            after = work(mapping, state)
        except POSError:
            after = None  # nothing to be undone, or nobody to ask
        if after is None:
            return
        self.states = [state, after]
        self.note("try", what=work.__name__, state=after)
        try:
            self.manager.commit()
        except ClientDisconnected:
            self.undoable = None
            self.figures["lost"] += 1
        except (POSError, Vetoed) as error:
            self.states = [state]
            self.undoable = None
            self.note("failed", why=f"{type(error).__name__}: {error}")
            self.figures["vetoed" if isinstance(error, Vetoed) else "failed"] += 1
        else:
            self.states = [after]
            self.undoable = description, state
            self.note("committed")
            self.figures[f"committed: {work.__name__}"] += 1

    def store(self, mapping, state):
        """Some blobs, new ones or over others."""
        for number in range(self.random.choice([1, 1, 2, 3])):
            ((low, high),) = self.random.choices([size for size, _ in SIZES], [share for _, share in SIZES])
            token = f"{self.name}-{self.life}-{self.number}-{number}-{self.random.randint(low, high)}"
            name = self.random.choice(NAMES)
            entry = mapping.setdefault(name, PersistentMapping())
            entry["token"] = token
            with entry.setdefault("blob", Blob()).open("w") as file:
                file.write(content(token))
        return tokens(mapping)

    def delete(self, mapping, state):
        """One of them."""
        if not state:
            return None
        del mapping[self.random.choice(sorted(state))]
        return tokens(mapping)

    def undo(self, mapping, state):
        """The last transaction, if nobody has packed since."""
        if self.undoable is None:
            return None
        description, before = self.undoable
        for entry in self.db.undoLog(0, 50):
            if entry["description"] in (description, description.encode()):  # it depends on the version of ZODB
                self.db.undo(entry["id"], self.manager.get())
                return before
        return None

    def give_up(self, mapping, state):
        """Blobs again, which must leave nothing behind."""
        self.store(mapping, state)
        self.manager.get().join(Veto())
        return state


class Reader(Client):
    """Reads what writers have written, and compares each byte."""

    #: A blob that was missing: its writer, its name, its token, and how often.
    suspect = None

    def step(self):
        try:
            root = self.connection.root()
            if self.suspect is None:
                writer = self.random.choice([name for name in root if name.startswith("writer")])
                name = self.random.choice(NAMES)
            else:
                writer, name, missing, times = self.suspect
            entry = root[writer].get(name)
            token = entry and entry["token"]
            if self.suspect is not None and token != missing:
                self.suspect = None
            if entry is None:
                return
        except POSError:
            return  # the server has gone
        try:
            with entry["blob"].open() as file:
                data = file.read()
        except POSKeyError as error:
            # Packed away since the transaction began? Then it is not so the next time.
            times = times + 1 if self.suspect else 1
            if times == ATTEMPTS:
                self.wrong(f"{token} is missing: {error}")
            self.suspect = writer, name, token, times
            time.sleep(0.05)
        except POSError:
            self.figures["not read"] += 1
            # ZEO's client keeps what it had received when the server died, appends the whole blob to it the next time,
            # and serves that. It does so with any server.
            for partial in self.blob_dir.rglob("*.dl"):
                partial.unlink(missing_ok=True)
        else:
            self.suspect = None
            if data != content(token):
                self.wrong(f"{len(data)} bytes, {data[:60]!r}, were read instead of {token}")
            self.figures["read"] += 1


class Packer(Client):
    """Packs now and then."""

    def step(self):
        try:
            self.db.pack()
        except POSError as error:
            self.note("failed", why=str(error))
            self.figures["not packed"] += 1
        else:
            self.figures["packed"] += 1

    def pause(self):
        return self.random.uniform(0, 1.5)


if __name__ == "__main__":
    logging.disable(logging.CRITICAL)  # what a client says when its server dies
    {"writer": Writer, "reader": Reader, "packer": Packer}[sys.argv[1]](*sys.argv[1:]).run()
