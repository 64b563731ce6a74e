// The viewer: one picture at full size with everything that is known of its job.

/** Index of the tile that is shown; -1 while the viewer is closed. */
let current = -1;

function openViewer(index) {
  moveTo(index, false);
  if (!viewer.open) viewer.showModal();
  show(index);
  $("close").focus();
}

function show(index) {
  current = index;
  const { row } = tiles[index];
  history.replaceState(null, "", row.id ? `#${row.id}` : "#");
  $("viewer-position").textContent = `${format.format(index + 1)} of ${format.format(tiles.length)}`;
  $("viewer-prompt").textContent = row.prompt ?? "(no prompt)";
  $("viewer-negative").textContent = row.negative_prompt ? `without ${row.negative_prompt}` : "";
  $("viewer-error").textContent = [row.error, ...(row.warnings ?? [])].filter(Boolean).join(" ");
  $("copy").hidden = $("viewer-text").hidden = !row.parameters;
  $("viewer-parameters").textContent = row.parameters ?? "";
  $("open").hidden = !row.url;
  if (row.url) $("open").href = row.url; else $("open").removeAttribute("href");
  $("previous").disabled = index === 0;
  $("next").disabled = index === tiles.length - 1;
  $("viewer-list").replaceChildren(...details(row).flatMap(([name, value]) => {
    const text = make("dd");
    text.append(make("bdi", "", value));
    return [make("dt", "", name), text];
  }));
  viewer.querySelector(".details").scrollTop = 0;
  viewer.scrollTop = 0;
  loadPicture(row, index);
  viewer.dispatchEvent(new Event("shown"));
}

/** What is listed of a job: pairs of label and value. */
function details(row) {
  const found = row.number ? [["Number", format.format(row.number)]] : [];
  if (row.line) found.push(["Line", row.line]);
  found.push(["State", row.state]);
  if (row.error_type) found.push(["Error", row.error_type]);
  for (const [name, { label }] of fields) {
    if (!TEXTS.has(name) && row[name]) found.push([label, row[name].replace(/^(\d+)x(\d+)$/, "$1 × $2")]);
  }
  for (const [name, value] of Object.entries(row.grid ?? {})) if (!fields.has(name)) found.push([name, value]);
  for (const [name, value] of Object.entries(row.metadata ?? {})) found.push([name, value]);
  for (const [name, value] of Object.entries(row.timings ?? {})) {
    found.push([name[0].toUpperCase() + name.slice(1), `${value} s`]);
  }
  if (row.nsfw) found.push(["Safety checker", "flagged"]);
  if (row.worker) found.push(["Worker", row.worker]);
  if (row.id) found.push(["Id", row.id]);
  if (row.uri) found.push(["Address", row.uri]);
  return found;
}

/** Shows the thumbnail at once and the full picture when it is there; then loads the pictures beside it. */
function loadPicture(row, index) {
  const image = $("viewer-image"), note = $("viewer-note");
  const small = thumbnail(row);
  const [width, height] = (row.size ?? "").split("x").map(Number);
  image.alt = describe(row);
  note.textContent = "";
  image.classList.remove("broken", "preview");
  // A small picture is enlarged five times at most.
  image.style.maxWidth = width ? `${width * 5}px` : "";
  image.style.maxHeight = height ? `${height * 5}px` : "";
  viewer.style.setProperty("--shape", Math.max(0.5, height / width || 1));
  if (!small && !row.url) {
    image.classList.add("broken");
    image.removeAttribute("src");
    note.textContent = row.state === "done" ? "Its picture was not found."
      : `No picture: this job ${row.state === "failed" ? "failed" : `is ${row.state}`}.`;
    return;
  }
  image.src = small ?? row.url;
  const full = new Image();
  full.onload = () => {
    if (current !== index) return;
    if (small) image.src = full.src;
    for (const near of [index + 1, index - 1]) if (tiles[near]?.row.url) new Image().src = tiles[near].row.url;
  };
  full.onerror = () => {
    if (current !== index) return;
    if (!small) image.classList.add("broken");
    const reason = expired() ? "The link to the full picture has expired" : "The full picture cannot be loaded";
    note.textContent = `${reason}. It is stored at ${row.uri}.`;
  };
  if (row.url) full.src = row.url;
}

function viewerKey(event) {
  const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
  if (step && tiles[current + step]) {
    event.preventDefault();
    show(current + step);
  } else if (event.key === "c") copy(tiles[current].row);
}

/** Copies the parameters of a row's picture, and says so for a moment. */
async function copy(row) {
  if (!row.parameters) return;
  let done = true;
  try {
    await navigator.clipboard.writeText(row.parameters);
  } catch {
    // The page has no https address, or no permission. The old way works from where the focus may be: in the
    // dialog while that is open.
    const area = make("textarea");
    area.value = row.parameters;
    (viewer.open ? viewer : document.body).append(area);
    area.select();
    done = document.execCommand("copy");
    area.remove();
  }
  $("copy").textContent = done ? "Copied" : "Select the text below";
  $("viewer-text").open ||= !done;
  if (!viewer.open && done) $("count").textContent = "Parameters copied";
  setTimeout(() => { $("copy").textContent = "Copy parameters"; showCount(); }, 1600);
}

$("previous").addEventListener("click", () => show(current - 1));
$("next").addEventListener("click", () => show(current + 1));
$("copy").addEventListener("click", () => copy(tiles[current].row));
$("close").addEventListener("click", () => viewer.close());
viewer.addEventListener("close", () => {
  history.replaceState(null, "", location.href.split("#")[0]);
  $("viewer-image").removeAttribute("src");
  const index = current;
  current = -1;
  moveTo(index);
});

// A swipe shows the next picture.
let touchedAt = null;
viewer.querySelector(".stage").addEventListener("pointerdown", (event) => { touchedAt = event.clientX; });
viewer.querySelector(".stage").addEventListener("pointerup", (event) => {
  const moved = event.pointerType === "touch" && touchedAt !== null ? event.clientX - touchedAt : 0;
  const index = current - Math.sign(moved);
  if (Math.abs(moved) > 48 && tiles[index]) show(index);
});
