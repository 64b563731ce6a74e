"""Keys and channels of Redis that hold the state of jobs, runs and workers.

    smallcat:job:<id>        hash     a job's record: see below
    smallcat:job:<id>        channel  the job's state when it has ended, or is queued again; "cancelled" also
                                      when one of several submissions is given up
      ...:<submission>       string   what belongs to a submission alone, as JSON: its metadata and priority;
                                      "+" before it, "-" once it was given up, "=" once it is done and
                                      the job was submitted again, "~" once it has failed and likewise
      ...:children           hash     ids of the jobs that wait until this one is done (`chains.lua`)
    smallcat:job::waiting    hash     ids of all jobs that wait for others
    smallcat:worker-only:job:<id>     the attempts at a job, which no producer may write: see below
                             hash
    smallcat:queues          set      names of the queues that jobs were sent to
    smallcat:failed          zset     ids of the jobs that failed for good, by time (`worker.state.failures`)
    smallcat:latest          zset     ids of the 1,000 jobs that were submitted last, by time; before those of
                                      tenants "TENANT/"
      ...:<tenant>           zset     likewise, of a tenant
    smallcat:drawn           zset     ids of the jobs without a tenant that were done last, also of runs, by
                                      time: 200 and some
      ...:<tenant>           zset     likewise, of a tenant's jobs
    smallcat:runs            zset     names of the 1,000 runs that were begun or resumed last, by time
    smallcat:run:<run>       hash     a run of prompt files (`producer.ingest.run_state`), and with it:
      ...:done, ...:failed   bitmaps  a bit for each job of the run, set by the script that ends the job
      ...:cancelled          bitmap   likewise: those of the failed that were cancelled
      ...:prints             hash     the first eight bytes of the fingerprint of each message of the run: of
                                      512 in a field, and "=<number>" of those that were sent again
      ...:news               list     how each job ended, until the run's feeder has read it
    smallcat:run::queue      string   the name of this queue in the folders of HTTP servers
                                      (`producer.http.run_queue`); no run has that name
    smallcat:worker:<name>   string   a worker's announcement as JSON (`worker.state.fleet`)
    smallcat:workers         set      names of the workers that announced themselves
    smallcat:worker::served  string   the digest of the live workers: which models are served, by how many; no
                                      worker has that name
    smallcat:worker-only:usage:<day>  what tenants have used, by day (`worker.state.usage`)
    smallcat:worker::files:<digest>   the files that workers offer beside their model, as JSON: once for all
                             string   that offer the same (`worker.state.file_indexes`)
    smallcat:worker-only:files        what workers know of the files in buckets, by their stamps
                             hash     (`worker.state.known_files`)
      ...:read:<hash>        string   a worker reads one of them
    smallcat:worker-only:fleet:...    the book that the digest is made from (`fleet_book.lua`)
    smallcat:served          string   the last announcements of each model, for when its workers are away
    smallcat:http:keys       hash     the keys of the HTTP API by their hash (`producer.http.key_store`)
      ...:used               hash     when each was last used
    smallcat:http:tenants    hash     the tenants and their limits (`producer.http.tenant_store`)
    smallcat:http:forgotten  hash     "tenant:<tenant>" -> when it was forgotten, "before" -> before when jobs
                                      were; for the files of runs (`producer.http.run_store`)
    smallcat:http:rate:..., spent:..., open:..., feeding:...
                                      what a tenant has used of its limits (`worker.state.tenant_limits`)
    smallcat:http:once:...   string   what was answered to a request with an Idempotency-Key
    smallcat:http:session:...         who signed in with a browser (`producer.http.sessions`)
                             string
    smallcat:http:sessions:...        the sessions of a key, by when they began
                             zset
    smallcat:http:model:...  string   the model that a caller of AUTOMATIC1111's API has chosen
    smallcat:webhooks:new    list     what producers tell webhooks of (`notify.lua`), until it is taken
    smallcat:worker-only:webhooks:... the book of notifications (`webhook_book.lua`), and what workers tell
    smallcat:preview:<id>    string   a running job's latents as a tiny picture (`worker.state.previews`)
    smallcat:to-workers      channel  to all workers: "cancel <id>" stops a running job; "watch" says that
                                      somebody follows a job's progress, so that it must be written often;
                                      "preview <id>" that somebody looks at a running job

Keys expire some time after their last change. Those of messages are the transport's (`worker.broker.layout`).

Fields of a job's record, beside those of `worker.contract.record.JobRecord`:

    message              for workers of earlier versions: the id of the job's only message; empty where it
                         has several
    claim, claim_until   the message that a worker works on, and until when the claim lasts, in Unix seconds;
                         a claim counts that the attempts have, too
    delivery             an earlier version's: the delivery of that message which was counted as an attempt
    deaths               attempts that have not ended; while none runs, those that ended with a worker's death
    try:<attempt>        an attempt, as the JSON of `worker.contract.record.Attempt`
    cancel               1 while a running job is asked to stop
    forgotten, of        where the record is the mark of a job that was forgotten: what for, and its tenant.
                         It has no other fields than those that say it was cancelled
    cancelled_at         when the job was cancelled for all that wanted it, in Unix seconds
    sub:<submission>     for each submission since the job was last queued that was not given up: the
                         fingerprint of its message; 1 where an earlier version sent it; "-" once that
                         message was set aside
    hook:<submission>    its webhook, as JSON (`worker.contract.webhook`), until it is told how the job ended
    hooks                1 while there are such fields
    subs                 how many they are, one that an earlier version made included
    runs                 marks of the runs that the job belongs to, separated by spaces
    waits_for            ids of the jobs whose pictures the job begins with and that are not done, separated
                         by blanks; then it is `queued`, and its messages are in none of the queues' lists
                         (but producers can write it: the job itself says what counts, `chains.lua`)
    held:<submission>    meanwhile, where that submission's message goes and, after a line feed, the message
    held:<run>:<number>  likewise, of a run's message
    ttl                  meanwhile, seconds that the record stays once it has failed
    released_at          when it waited no longer, in Unix seconds: from then on it waited for a worker
    children             1 once other jobs waited for this one
    bulk                 1 when only runs have sent the job: its record is short-lived once the job is done

Fields of a job's attempts. Those of the record that have the same names are for readers, and for workers of
earlier versions, who look there:

    attempts, deaths     as in the record
    claim, claim_until   the holder of the job (`holder_of`), and until when its claim lasts, in Unix seconds
    open:<holder>        the delivery of its message which was counted, until it is known how it ended; of
                         earlier versions: open:<message>
    failed               1 once the job has failed: a record that says so without it is not believed
"""

from __future__ import annotations

import hashlib
from typing import Final

#: Names of the queues that jobs were sent to.
QUEUES: Final = "smallcat:queues"
#: Ids of the jobs that failed for good, scored by the time.
FAILED: Final = "smallcat:failed"
#: Ids of the jobs that were submitted last, scored by the time. Jobs of runs are not among them.
LATEST: Final = "smallcat:latest"
#: Ids of the jobs without a tenant that were done last, scored by the time. Workers write it.
DRAWN: Final = "smallcat:drawn"
#: The jobs that wait for others. `chains.lua` has the name, too.
WAITING: Final = "smallcat:job::waiting"
#: Names of the runs, scored by when they were begun or resumed last.
RUNS: Final = "smallcat:runs"
#: Names of the workers that announced themselves.
WORKERS: Final = "smallcat:workers"
#: The last announcements of each model.
SERVED: Final = "smallcat:served"
#: Which models are served, by how many live workers.
DIGEST: Final = "smallcat:worker::served"
#: The keys of the HTTP API, and when each was last used.
HTTP_KEYS: Final = "smallcat:http:keys"
HTTP_KEYS_USED: Final = "smallcat:http:keys:used"
#: The tenants of the HTTP API.
HTTP_TENANTS: Final = "smallcat:http:tenants"
#: The name of the queue in the folders of HTTP servers. It begins as runs' keys do, which they may write.
HTTP_QUEUE: Final = "smallcat:run::queue"
#: The tenants and times whose runs' files the HTTP servers are to delete (`worker.state.forgetting`).
HTTP_FORGOTTEN: Final = "smallcat:http:forgotten"
#: Begins the keys of what a tenant has used of its limits; its name follows.
HTTP_RATE: Final = "smallcat:http:rate:"
HTTP_SPENT: Final = "smallcat:http:spent:"
HTTP_OPEN: Final = "smallcat:http:open:"
HTTP_FEEDING: Final = "smallcat:http:feeding:"
#: Begins the keys of answers to requests with an Idempotency-Key, and of callers' models.
HTTP_ONCE: Final = "smallcat:http:once:"
HTTP_MODEL: Final = "smallcat:http:model:"
#: Begins the keys of browsers' sessions, and of the sessions of each key.
HTTP_SESSION: Final = "smallcat:http:session:"
HTTP_SESSIONS: Final = "smallcat:http:sessions:"
#: Begins the keys that workers alone write.
WORKER_ONLY: Final = "smallcat:worker-only:"
#: Begins the keys of what tenants have used, by day (`worker.state.usage`).
USAGE: Final = f"{WORKER_ONLY}usage:"
#: What workers know of the files in buckets; and what begins the key of a file that one of them reads.
KNOWN_FILES: Final = f"{WORKER_ONLY}files"
READ_FILE: Final = f"{KNOWN_FILES}:read:"
#: Begins the keys of the book that the digest is made from.
BOOK: Final = f"{WORKER_ONLY}fleet"
#: The messages that workers hold: the transport's (`worker.broker.transport.UNACKED`).
HELD: Final = "smallcat:unacked"
#: Begins the keys of the book of notifications to webhooks; `webhook_book.lua` makes them, too.
WEBHOOKS: Final = f"{WORKER_ONLY}webhooks"
#: What producers tell webhooks of. `notify.lua` has the name, too.
TOLD_BY_PRODUCERS: Final = "smallcat:webhooks:new"
#: Channel to all workers.
WORKERS_CHANNEL: Final = "smallcat:to-workers"


def job_key(job_id: str) -> str:
    """The key of a job's record, and the channel of its state. `mark_runs.lua` takes the id out of it."""
    return f"smallcat:job:{job_id}"


def latest_key(tenant: str) -> str:
    """The key of the jobs of a tenant that were submitted last; of all jobs where it is empty.

    `submit.lua` takes the tenant out of it.
    """
    return f"{LATEST}:{tenant}" if tenant else LATEST


def drawn_key(tenant: str) -> str:
    """The key of the jobs of a tenant that were done last; of those without one where it is empty."""
    return f"{DRAWN}:{tenant}" if tenant else DRAWN


def submission_key(job_id: str, submission: str) -> str:
    """The key of one submission of a job. `outcome.lua` makes it, too."""
    return f"{job_key(job_id)}:{submission}"


def attempts_key(job_id: str) -> str:
    """The key of the attempts at a job. Producers may neither read nor write what begins so."""
    return f"{WORKER_ONLY}job:{job_id}"


def holder_of(message: str) -> tuple[str, str]:
    """A message's id, and which of its copies it is. `message`: its id, "/", the tag that it is held by."""
    message_id, _, tag = message.partition("/")
    return message_id, hashlib.sha256(message.encode()).hexdigest()[:20] if tag else message_id


def run_key(run: str) -> str:
    """The key of a run. Its other keys begin with it. `mark_runs.lua` makes it, too."""
    return f"smallcat:run:{run}"


def worker_key(name: str) -> str:
    """The key of a worker's announcement."""
    return f"smallcat:worker:{name}"


def index_key(digest: str) -> str:
    """The key of an index of files. No worker has such a name."""
    return f"smallcat:worker::files:{digest}"


def preview_key(job_id: str) -> str:
    """The key of a running job's preview. Producers may read it and not write it."""
    return f"smallcat:preview:{job_id}"
