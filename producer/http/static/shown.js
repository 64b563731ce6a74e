// The viewer's own things on this page: progress, previews, cancelling, and using the parameters again.

const again = make("button", "", "Use again");
again.type = "button";
const giveUp = make("button", "", "Cancel");
giveUp.type = "button";
$("open").before(again, giveUp);

function openJob(id) {
  const index = tiles.findIndex((each) => each.row.id === id);
  if (index >= 0) openViewer(index);
}

// The viewer shows another job.
viewer.addEventListener("shown", () => {
  const { row } = tiles[current];
  again.hidden = !may("submit");
  giveUp.textContent = "Cancel";
  giveUp.disabled = false;
  fillShown(row);
  readMore(row);
});

/** What changes of the shown job while it is shown. */
function fillShown(row) {
  giveUp.hidden = ENDED.has(row.state) || !row.may_cancel || !may("submit");
  if (ENDED.has(row.state)) return;
  const text = row.state === "queued" ? `It waits since ${clock(row.at)}.`
    : row.state === "waiting" ? "It waits for the picture of another job."
    : row.of && row.step ? `Step ${row.step} of ${row.of}.` : "It begins.";
  $("viewer-note").textContent = text;
  if (shownPreviews.has(row.id)) showPreview(shownPreviews.get(row.id));
}

/** After news: the shown job stays shown, wherever it is now. */
function followShown(before) {
  const index = tiles.findIndex((each) => each.row.id === before.id);
  if (index < 0) {
    viewer.close();
    return;
  }
  current = index;
  const { row } = tiles[index];
  if (row.state !== before.state) show(index);
  else if (row !== before) fillShown(row);
  $("viewer-position").textContent = `${format.format(index + 1)} of ${format.format(tiles.length)}`;
  $("previous").disabled = index === 0;
  $("next").disabled = index === tiles.length - 1;
}

/** Why a job does not start, and the caller's own metadata, which the list does not have. */
async function readMore(row) {
  try {
    const found = await call("GET", pathOf(row));
    if (tiles[current]?.row.id !== row.id) return;
    if (found.note) $("viewer-note").textContent = found.note;
    for (const [name, value] of Object.entries(found.job.metadata ?? {})) {
      const text = make("dd");
      text.append(make("bdi", "", typeof value === "string" ? value : JSON.stringify(value)));
      $("viewer-list").append(make("dt", "", name), text);
    }
  } catch {
    // The list has what matters.
  }
}

again.addEventListener("click", async () => {
  const { row } = tiles[current];
  try {
    const { job } = await call("GET", pathOf(row));
    // Another worker may serve another revision by now.
    fillForm({ ...job, revision: "" }, row);
    viewer.close();
    controls.get("prompt")?.element.focus();
  } catch (error) {
    $("viewer-note").textContent = error.message;
  }
});
giveUp.addEventListener("click", () => cancel(tiles[current].row.id, giveUp));

// Previews: asked for while somebody wants to see them, at most twice a second for each job.
const EVERY_MS = 600;
/** Jobs of the list whose previews are asked for at a time. */
const MOST_PREVIEWS = 6;
let isAsking = false;
/** The steps of the preview that is shown of each job, and its address, which holds memory until it is given up. */
const seenSteps = new Map(), shownPreviews = new Map();

async function askForPreviews() {
  if (isAsking || document.hidden || !session.name) return;
  isAsking = true;
  for (const [id, address] of shownPreviews) {
    if (jobs.get(id)?.state === "running") continue;
    URL.revokeObjectURL(address);
    shownPreviews.delete(id);
    seenSteps.delete(id);
  }
  const wanted = tiles.filter(({ row }, index) => row.state === "running" && (viewer.open ? index === current
    : $("previews").checked)).slice(0, MOST_PREVIEWS);
  await Promise.all(wanted.map(({ row }) => askForPreview(row)));
  isAsking = false;
}

async function askForPreview(row) {
  const image = new Image();
  image.alt = `Preview: ${describe(row)}`;
  try {
    const answer = await fetch(pathOf(row, "/preview", { after: seenSteps.get(row.id) ?? 0 }));
    if (answer.status !== 200) return;  // There is no newer one so far.
    seenSteps.set(row.id, Number.parseInt(answer.headers.get("X-Step"), 10));
    image.src = URL.createObjectURL(await answer.blob());
    await image.decode();
  } catch {
    return;
  }
  URL.revokeObjectURL(shownPreviews.get(row.id));
  shownPreviews.set(row.id, image.src);
  if (viewer.open && tiles[current]?.row.id === row.id && tiles[current].row.state === "running") {
    showPreview(image.src);
  }
  const place = document.querySelector(`#now [data-job="${row.id}"] .preview`);
  if (!place) return;
  place.replaceChildren(image);
}

function showPreview(address) {
  const shown = $("viewer-image");
  shown.classList.remove("broken");
  shown.classList.add("preview");
  shown.src = address;
}

setInterval(askForPreviews, EVERY_MS);
$("previews").addEventListener("change", () => {
  for (const open of document.querySelectorAll("#now .open")) {
    open.querySelector(".preview").hidden = !$("previews").checked || jobs.get(open.dataset.job)?.state !== "running";
  }
  askForPreviews();
});
