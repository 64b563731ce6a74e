// The jobs: those that wait or run, the latest pictures, and those that failed.

/** Jobs that wait or run which are listed, and failed ones. */
const MOST_NOW = 8, MOST_FAILED = 8;

const showNow = list($("now"), (row) => row.id, makeNow, fillNow);
const showPictures = list($("pictures"), (row) => row.id, makePicture, () => {});
const showFailed = list($("failed"), (row) => row.id, makeFailed, fillFailed);

function showAll() {
  showJobs();
  showFleet();
}

function showJobs() {
  const rows = [...jobs.values()];
  const latest = (a, b) => b.at - a.at;
  const now = rows.filter((row) => !ENDED.has(row.state)).sort((a, b) =>
    (b.state === "running") - (a.state === "running") || share(b) - share(a) || a.at - b.at);
  const done = rows.filter((row) => row.state === "done").sort(latest);
  const failed = rows.filter((row) => row.state === "failed").sort(latest);
  const listed = now.slice(0, MOST_NOW);
  showNow(listed);
  showPictures(done);
  showFailed(failed.slice(0, MOST_FAILED));
  const isKnown = fleet !== null || rows.length > 0;
  $("now-empty").hidden = now.length > 0 || !isKnown;
  $("now-more").hidden = now.length <= MOST_NOW;
  $("now-more").textContent = `And ${format.format(now.length - MOST_NOW)} more of the latest jobs.`;
  $("pictures-empty").hidden = done.length > 0 || !isKnown;
  $("failed-section").hidden = !failed.length;
  const shown = current >= 0 ? tiles[current]?.row : null;
  tiles = [...listed, ...done, ...failed.slice(0, MOST_FAILED)].map((row) => ({ row }));
  if (!document.querySelector('#pictures .tile[tabindex="0"]')) moveTo(listed.length, false);
  if (shown) followShown(shown);
  openWanted();
  showSummary();
}

/** An address that ends in a job's id opens that job. */
let wanted = location.hash.slice(1);
function openWanted() {
  if (!wanted || viewer.open || !tiles.some((each) => each.row.id === wanted)) return;
  openJob(wanted);
  wanted = "";
}

const share = (row) => (row.of ? row.step / row.of : 0);

function makeNow(row) {
  const item = make("li", "job");
  const open = make("button", "open");
  open.type = "button";
  open.dataset.job = row.id;
  const preview = make("span", "preview");
  preview.hidden = true;
  const text = make("span", "text");
  const prompt = make("bdi", "prompt", row.prompt ?? "");
  prompt.dir = "auto";
  text.append(prompt, make("span", "how"));
  open.append(preview, text);
  const bar = make("progress");
  bar.setAttribute("aria-label", "Steps");
  item.append(open, bar);
  open.addEventListener("click", () => openJob(row.id));
  return item;
}

function fillNow(item, row) {
  const isRunning = row.state === "running";
  item.querySelector(".how").textContent = !isRunning ? `waits since ${clock(row.at)}`
    : row.of && row.step ? `step ${row.step} of ${row.of}` : "begins";
  item.querySelector(".preview").hidden = !isRunning || !$("previews").checked;
  const bar = item.querySelector("progress");
  bar.hidden = !isRunning;
  bar.max = row.of || 1;
  bar.value = row.of ? row.step : 0;
  let button = item.querySelector(".cancel");
  if (button || !row.may_cancel || !may("submit")) return;
  button = make("button", "cancel", "Cancel");
  button.type = "button";
  button.setAttribute("aria-label", `Cancel: ${describe(row).slice(0, 80)}`);
  button.addEventListener("click", () => cancel(row.id, button));
  item.append(button);
}

async function cancel(id, button) {
  button.disabled = true;
  try {
    await call("DELETE", pathOf(jobs.get(id) ?? { id }));
    button.textContent = "Cancelled";
  } catch (error) {
    button.disabled = false;
    $("count").textContent = error.message;
    setTimeout(showCount, 6000);
  }
}

function makePicture(row) {
  const tile = make("button", "tile");
  tile.type = "button";
  tile.tabIndex = -1;
  tile.dataset.job = row.id;
  tile.append(drawPicture(row));
  const caption = make("bdi", "caption", row.prompt ?? "");
  caption.dir = "auto";
  const numbers = make("span", "numbers");
  numbers.append(make("span", "", clock(row.at)), make("span", "", row.seed ? `seed ${row.seed}` : ""));
  tile.append(caption, numbers);
  tile.addEventListener("click", () => openJob(row.id));
  return tile;
}

function makeFailed(row) {
  const item = make("li", "job");
  const open = make("button", "open");
  open.type = "button";
  open.dataset.job = row.id;
  const text = make("span", "text");
  const prompt = make("bdi", "prompt", row.prompt ?? "");
  prompt.dir = "auto";
  text.append(prompt, make("bdi", "why"), make("span", "how"));
  open.append(text);
  open.addEventListener("click", () => openJob(row.id));
  item.append(open);
  return item;
}

function fillFailed(item, row) {
  item.querySelector(".why").textContent = row.error ?? "It failed, and nothing says why.";
  item.querySelector(".how").textContent = clock(row.at);
}

$("pictures").addEventListener("error", (event) => {
  const image = event.target;
  if (image.tagName !== "IMG" || image.classList.contains("broken")) return;
  image.classList.add("broken");
  image.after(makeNote("not loaded", "The server or the bucket does not answer. Load the page again.", true));
}, true);
