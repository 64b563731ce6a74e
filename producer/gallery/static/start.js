// The start: the page's head, the controls of the bar, and the first drawing.

function writeHead() {
  const counts = new Map();
  for (const row of rows) counts.set(row.state, (counts.get(row.state) ?? 0) + 1);
  const parts = [document.createTextNode(many(counts.get("done") ?? 0, "picture"))];
  for (const [state, count] of counts) if (state !== "done") parts.push(stateButton(state, count));
  if (prompts.size > 1) parts.push(document.createTextNode(many(prompts.size, "prompt")));
  parts.push(document.createTextNode(`made ${when(about.made_at)}`));
  if (about.expires_at !== null && !expired()) {
    const until = `${about.temporary_keys ? "at most until" : "until"} ${when(about.expires_at)}`;
    parts.push(document.createTextNode(about.thumbs_per_block ? `full pictures open ${until}` : `links work ${until}`));
  }
  parts.forEach((part, index) => $("summary").append(...(index ? [" · ", part] : [part])));
  const notices = [...about.notices];
  if (expired()) {
    notices.unshift(`The links on this page expired on ${when(about.expires_at)}: make it again with \`${about.command}\`.`);
  }
  $("notice").textContent = notices.join(" ");
  $("notice").hidden = !notices.length;
}

/** Shows the jobs of one state alone, and all of them when it is pressed again. */
function stateButton(state, count) {
  const button = make("button", state === "failed" ? "failures" : "", `${format.format(count)} ${state}`);
  button.type = "button";
  button.addEventListener("click", () => setFilter(filter.value === `state:${state}` ? "" : `state:${state}`));
  return button;
}

let scheduled = false;
scroller.addEventListener("scroll", () => {
  if (scheduled) return;
  scheduled = true;
  requestAnimationFrame(() => { scheduled = false; draw(); });
}, { passive: true });

filter.addEventListener("input", () => {
  view.query = filter.value;
  // Back to the first tile that matches.
  scroller.scrollTop = Math.min(scroller.scrollTop, $("bar").offsetTop);
  arrange();
});
$("bar").addEventListener("submit", (event) => event.preventDefault());
$("clear").addEventListener("click", () => { setFilter(""); filter.focus(); });
$("size").addEventListener("input", () => { view.size = Number($("size").value); arrange(); });
$("options-button").addEventListener("click", () => {
  $("options-button").setAttribute("aria-expanded", $("options").classList.toggle("open"));
});

const noteBarHeight = () => document.documentElement.style.setProperty("--bar", `${$("bar").offsetHeight}px`);
let lastWidth = 0;
new ResizeObserver(() => {
  noteBarHeight();
  if (scroller.clientWidth === lastWidth) {
    draw();
  } else {
    lastWidth = scroller.clientWidth;
    arrange();
  }
}).observe(scroller);

chooseView();
fillSelects();
if (matchMedia("(max-width: 46rem)").matches) { view.size = 104; $("size").value = 104; }
writeHead();
whenIdle(() => prepareSearchTexts());
lastWidth = scroller.clientWidth;
arrange();
new ResizeObserver(noteBarHeight).observe($("bar"));
// Thumbnails come after this script: what was drawn without them is drawn again.
if (about.thumbs_per_block) document.addEventListener("DOMContentLoaded", arrange);
// An address that ends in a job's id opens that job's picture.
const wantedId = location.hash.slice(1);
const wantedTile = wantedId ? tiles.findIndex((each) => each.row.id === wantedId) : -1;
if (wantedTile >= 0) openViewer(wantedTile);
