// The workers, the runs, and the sentence at the top.

const showWorkers = list($("workers"), (worker) => worker.name, makeWorker, fillWorker);
const showRunList = list($("runs"), (run) => run.run, makeRun, fillRun);

const rate = (value) => (value >= 10 ? format.format(Math.round(value)) : value.toPrecision(2).replace(/\.?0+$/, ""));
const pace = (value) => `${rate(value)} ${rate(value) === "1" ? "picture" : "pictures"} a second`;

function showFleet() {
  const workers = fleet?.workers ?? [];
  showWorkers(workers);
  $("workers-empty").hidden = workers.length > 0 || !fleet;
  const alone = (fleet?.queues ?? []).filter((each) => !each.workers);
  $("now-note").hidden = !alone.length;
  $("now-note").textContent = alone.map((each) =>
    `${many(each.waiting, "message")} in the queue ${each.queue} ${each.waiting === 1 ? "waits" : "wait"}, and no ` +
    "worker that takes them is running.").join(" ");
  $("now-empty").hidden = !fleet || [...jobs.values()].some((row) => !ENDED.has(row.state));
  $("pictures-empty").hidden = !fleet || [...jobs.values()].some((row) => row.state === "done");
  showSummary();
  showDefaults();
}

/** Pictures a second; while nothing runs, they are of the work before. */
const paceOf = (value, running) => (running ? pace(value) : `lately ${pace(value)}`);
const ABOUT_ROWS = "Each step of a batch draws several pictures at once, one row each, or two with guidance. " +
  "This is how many rows a step has had lately, of those that fit.";

/** What goes on, in a sentence. */
function showSummary() {
  if (!fleet) return;
  const failed = [...jobs.values()].filter((row) => row.state === "failed").length;
  const pictures = fleet.workers.reduce((sum, each) => sum + each.images_s, 0);
  const parts = [`${format.format(fleet.waiting)} waiting`, `${format.format(fleet.running)} running`];
  if (failed) parts.push(`${format.format(failed)} failed`);
  if (pictures) parts.push(paceOf(pictures, fleet.running));
  parts.push(many(fleet.workers.length + fleet.more_workers, "worker"));
  const text = parts.join(" · ");
  if ($("summary").textContent !== text) $("summary").textContent = text;
}

function makeWorker() {
  const item = make("li", "worker");
  item.append(make("b"), make("bdi", "model"), make("span", "numbers-of"), make("span", "paused"));
  return item;
}

function fillWorker(item, worker) {
  item.title = worker.name;
  item.querySelector("b").textContent = worker.device;
  item.querySelector(".model").textContent = `${worker.model} at ${worker.revision.slice(0, 8)}`;
  const parts = [`${format.format(worker.running)} running`];
  if (worker.images_s) parts.push(paceOf(worker.images_s, worker.running));
  parts.push(worker.step_rows ? `${rate(worker.step_rows)} of ${worker.max_rows} rows a step`
    : `up to ${many(worker.max_rows, "row")} a step`);
  item.querySelector(".numbers-of").textContent = parts.join(" · ");
  item.querySelector(".numbers-of").title = ABOUT_ROWS;
  item.querySelector(".paused").textContent = worker.paused ? `Paused: ${worker.paused}` : "";
}

/** Runs are asked for every few seconds while somebody sees the page. */
let runTimer = 0;

async function showRuns() {
  clearTimeout(runTimer);
  if (!session.name) return;
  let again = 10_000;
  if (!document.hidden) {
    try {
      const { runs } = await call("GET", "/v1/runs");
      runs.sort((a, b) => (b.created ?? Infinity) - (a.created ?? Infinity));
      // Equal runs are one object, so that only what has changed is filled again.
      showRunList(runs.slice(0, 20).map(same));
      $("runs-empty").hidden = runs.length > 0;
      if (runs.some((run) => ["feeding", "waiting"].includes(run.state))) again = 2_000;
    } catch {
      // The notice at the top says that the server does not answer.
    }
  }
  if (session.name) runTimer = setTimeout(showRuns, again);
}

const seenRuns = new Map();
function same(run) {
  const text = JSON.stringify(run);
  if (seenRuns.get(run.run)?.text !== text) seenRuns.set(run.run, { text, run });
  return seenRuns.get(run.run).run;
}

function makeRun() {
  const item = make("li", "run");
  const bar = make("progress");
  bar.setAttribute("aria-label", "Jobs that have ended");
  item.append(make("bdi", "prompt"), make("span", "how"), bar, make("span", "why"), make("span", "links"));
  return item;
}

function fillRun(item, run) {
  const all = run.total ?? run.sent, ended = run.done + run.failed + run.cancelled;
  item.querySelector(".prompt").textContent = run.files.join(", ") || run.run;
  const counts = [run.state, `${format.format(run.done)} of ${format.format(all)} done`];
  if (run.waiting) counts.push(`${format.format(run.waiting)} ${run.waiting === 1 ? "waits for another job's picture"
    : "wait for other jobs' pictures"}`);
  if (run.failed) counts.push(`${format.format(run.failed)} failed`);
  if (run.cancelled) counts.push(`${format.format(run.cancelled)} cancelled`);
  if (run.rejected) counts.push(`${many(run.rejected, "line")} rejected`);
  item.querySelector(".how").textContent = counts.join(" · ");
  item.querySelector(".why").textContent = run.error;
  const bar = item.querySelector("progress");
  bar.hidden = !["feeding", "waiting", "stopped"].includes(run.state);
  bar.max = all || 1;
  bar.value = ended;
  const links = [];
  if (ended) links.push(linkTo(run.links.gallery, "Gallery"));
  if (run.state === "finished") links.push(linkTo(run.links.manifest, "Manifest"));
  if (run.rejected) links.push(linkTo(run.links.rejected, "Rejected lines"));
  if (may("submit") && ["feeding", "waiting", "stopped"].includes(run.state)) links.push(cancelRun(run));
  item.querySelector(".links").replaceChildren(...links);
}

function linkTo(address, text) {
  const link = make("a", "", text);
  link.href = address;
  link.target = "_blank";
  link.rel = "noopener";
  return link;
}

function cancelRun(run) {
  const button = make("button", "cancel", "Cancel");
  button.type = "button";
  button.setAttribute("aria-label", `Cancel the run of ${run.files.join(", ")}`);
  button.addEventListener("click", async () => {
    button.disabled = true;
    try {
      await call("DELETE", run.links.self);
      showRuns();
    } catch (error) {
      button.disabled = false;
      $("count").textContent = error.message;
    }
  });
  return button;
}
document.addEventListener("visibilitychange", () => { if (!document.hidden) showRuns(); });

$("run-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  const [file] = $("run-file").files, button = event.submitter ?? $("run-form").querySelector("button");
  $("run-said").textContent = file ? "" : "No file is chosen: choose one with a prompt a line, or a table.";
  if (!file) return;
  button.disabled = true;
  try {
    await call("POST", `/v1/runs?${new URLSearchParams({ name: file.name })}`, file);
    $("run-form").reset();
    showRuns();
  } catch (error) {
    say($("run-said"), error.message);
  } finally {
    button.disabled = false;
  }
});
