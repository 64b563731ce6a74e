// Moving about: the tile that has the focus, arrow keys, scrolling to a tile, and the page's other keys.

/** Index of the tile that the Tab key reaches. */
let cursor = 0;

const stickyHeight = () => $("bar").offsetHeight + ($("columns").hidden ? 0 : $("columns").offsetHeight);

/** The row at the top of the window; null while the page's head is in sight. */
function topRow() {
  const line = lines[firstLineBelow(scroller.scrollTop - grid.offsetTop)];
  const index = line?.cells?.find((each) => each >= 0);
  return scroller.scrollTop > grid.offsetTop && index !== undefined ? tiles[index].row : null;
}

function scrollToRow(row) {
  const tile = tiles.find((each) => each.row === row);
  if (tile) scroller.scrollTop = grid.offsetTop + lines[tile.line].top - stickyHeight();
}

function moveTo(index, focus = true) {
  if (index < 0 || index >= tiles.length) return;
  grid.querySelector(`[data-index="${cursor}"]`)?.setAttribute("tabindex", "-1");
  cursor = index;
  const line = lines[tiles[index].line];
  const top = grid.offsetTop + line.top;
  if (top < scroller.scrollTop + stickyHeight()) scroller.scrollTop = top - stickyHeight() - 8;
  else if (top + line.height > scroller.scrollTop + scroller.clientHeight) {
    scroller.scrollTop = top + line.height - scroller.clientHeight + 8;
  }
  draw();
  const tile = grid.querySelector(`[data-index="${index}"]`);
  tile.tabIndex = 0;
  if (focus) tile.focus({ preventScroll: true });
  if (view.across) tile.scrollIntoView({ block: "nearest", inline: "nearest" });
}

/** The tile above (`step` -1) or below (1): in the nearest line with tiles, the nearest column. */
function vertical(step) {
  const start = tiles[cursor].line, column = lines[start].cells.indexOf(cursor);
  for (let index = start + step; lines[index]; index += step) {
    const near = (lines[index].cells ?? []).map((tile, at) => [tile, Math.abs(at - column)])
      .filter(([tile]) => tile >= 0).sort((a, b) => a[1] - b[1]);
    if (near.length) return near[0][0];
  }
  return cursor;
}

function gridKey(event) {
  const moves = {
    ArrowRight: () => cursor + 1, ArrowLeft: () => cursor - 1, ArrowDown: () => vertical(1),
    ArrowUp: () => vertical(-1), Home: () => 0, End: () => tiles.length - 1,
  };
  const move = moves[event.key];
  if (!move || !tiles.length) return;
  event.preventDefault();
  // The first arrow key after a click elsewhere only shows which tile has the focus.
  moveTo(document.activeElement?.classList.contains("tile") ? move() : Math.min(cursor, tiles.length - 1));
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const typing = event.target === filter;
  if (viewer.open) viewerKey(event);
  else if (event.key === "Escape" && typing) {
    event.preventDefault();
    if (filter.value) setFilter(""); else scroller.focus();
  } else if (event.key === "/" && !typing) {
    event.preventDefault();
    filter.focus();
    filter.select();
  } else if (event.key === "ArrowDown" && typing && tiles.length) {
    event.preventDefault();
    moveTo(cursor);
  } else if (!["INPUT", "SELECT"].includes(event.target.tagName)) {
    if (event.key === "c" && event.target.classList.contains("tile")) copy(tiles[cursor].row);
    else gridKey(event);
  }
});

grid.addEventListener("click", (event) => {
  const tile = event.target.closest(".tile");
  if (tile) openViewer(Number(tile.dataset.index));
});
