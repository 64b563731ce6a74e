// The keyboard, and the beginning.

/** The tile to the left, right, above or below the one that has the focus. */
function neighbour(tile, key) {
  const all = [...document.querySelectorAll("#pictures .tile")];
  const index = all.indexOf(tile), side = { ArrowLeft: -1, ArrowRight: 1 }[key];
  if (key === "Home") return all[0];
  if (key === "End") return all.at(-1);
  if (side) return all[index + side];
  const here = tile.getBoundingClientRect(), step = key === "ArrowDown" ? 1 : -1;
  let found = null, top = null;
  for (let at = index + step; all[at]; at += step) {
    const box = all[at].getBoundingClientRect();
    if (Math.abs(box.top - here.top) < 2) continue;
    if (top !== null && Math.abs(box.top - top) > 2) break;
    top = box.top;
    if (!found || Math.abs(box.left - here.left) < Math.abs(found.getBoundingClientRect().left - here.left)) found = all[at];
  }
  return found;
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (viewer.open) {
    viewerKey(event);
    return;
  }
  if (["INPUT", "SELECT", "TEXTAREA"].includes(event.target.tagName)) {
    if (event.key === "Escape") event.target.blur();
    return;
  }
  const tile = event.target.closest?.(".tile");
  if (tile && event.key === "c") copy(jobs.get(tile.dataset.job));
  else if (tile && /^(Arrow|Home|End)/.test(event.key)) {
    const next = neighbour(tile, event.key);
    if (next) moveTo(tiles.findIndex((each) => each.row.id === next.dataset.job));
    event.preventDefault();
  } else if (event.key === "n" && controls.size) {
    event.preventDefault();
    controls.get("prompt").element.focus();
  }
});

begin();
