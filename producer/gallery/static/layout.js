// The layout: which lines the page has, where they are and how high. Nothing here is drawn but the column
// headings. A line spans the page's width; its kind is "title" (of a group), "label" (of a grid's row, on
// narrow windows) or "tiles".

/** All lines from top to bottom. `top` and `height` in CSS pixels from the top of the grid. */
let lines = [];
/** All tiles in the order in which the arrow keys move: its row, and the index of its line. */
let tiles = [];
/** The rows that match the filter. */
let shown = rows;
/** What the window's size gives, see `measure`. */
let metrics = {};
const canvas = document.createElement("canvas").getContext("2d");

function measure() {
  const rem = parseFloat(getComputedStyle(document.documentElement).fontSize);
  const margin = parseFloat(getComputedStyle(document.querySelector("header")).paddingLeft);
  const width = Math.max(200, scroller.clientWidth - 2 * margin);
  const narrow = width < 36 * rem;
  const sizes = new Map();
  for (const row of rows) if (row.size) sizes.set(row.size, (sizes.get(row.size) ?? 0) + 1);
  const [common] = [...sizes].sort((a, b) => b[1] - a[1])[0] ?? ["1x1"];
  const [wide, high] = common.split("x").map(Number);
  // The font of a title under a name that the canvas knows, too: to count the lines that a title takes.
  canvas.font = `${1.1875 * rem}px ${getComputedStyle(document.querySelector("h1")).fontFamily}`;
  const aspect = Math.min(2.4, Math.max(0.42, wide / high || 1));
  return { rem, margin, width, narrow, space: canvas.measureText(" ").width, aspect };
}

/** Filter, lay out and draw anew; the picture at the window's top stays there. */
function arrange() {
  const anchor = lines.length ? topRow() : null;
  metrics = measure();
  shown = view.query.trim() ? rows.filter(matcher(view.query)) : rows;
  if (view.down === view.across) view.down = "";
  $("down").value = view.down;
  $("down").disabled = !view.across;
  removeDrawn();
  lines = [];
  tiles = [];
  const extent = { top: view.across ? 8 : 14, width: metrics.width };
  if (view.across) layOutGrid(extent); else layOutTiles(extent);
  grid.style.height = `${extent.top}px`;
  grid.style.width = `${extent.width + 2 * metrics.margin}px`;
  grid.setAttribute("aria-rowcount", lines.length);
  $("columns").hidden = !view.across || !shown.length;
  $("nothing").hidden = shown.length > 0;
  showCount();
  cursor = Math.min(cursor, Math.max(0, tiles.length - 1));
  if (anchor !== null && !view.query) scrollToRow(anchor);
  draw();
}

/** The shown rows as [value, rows] of each group; a single group without a name where nothing is grouped. */
function groups() {
  if (!view.group) return [["", shown]];
  const get = view.group === "prompt" ? (row) => row.prompt : axisOf.get(view.group).get;
  const found = new Map();
  for (const row of shown) {
    const value = get(row) ?? "";
    if (!found.has(value)) found.set(value, []);
    found.get(value).push(row);
  }
  if (view.group === "prompt") return [...found];
  return axisOf.get(view.group).order.filter((value) => found.has(value)).map((value) => [value, found.get(value)]);
}

function addTitle(extent, value, members) {
  if (!view.group) return;
  const text = view.group === "prompt" ? value || "(no prompt)" : `${axisOf.get(view.group).label}: ${value || "–"}`;
  const room = Math.min(46 * metrics.rem, metrics.width - 3.5 * metrics.rem);
  const gap = lines.length ? 2.6 : 0.7;
  const height = Math.round((gap + Math.min(3, countTextLines(text, room)) * 1.604 + 0.6) * metrics.rem);
  lines.push({ kind: "title", top: extent.top, height, text, room, count: members.length, ruled: lines.length > 0 });
  extent.top += height;
}

/** Lines that a text takes in `room` pixels: broken between words as a browser does, long words anywhere. */
function countTextLines(text, room) {
  let count = 1, used = 0;
  for (const word of text.split(/\s+/)) {
    const width = widthOf(word);
    if (used && used + width > room) { count += 1; used = 0; }
    used += width + metrics.space;
    while (used > room * 1.02) { count += 1; used -= room; }
    if (count > 3) break;
  }
  return count;
}

// Measuring is slow, and the many prompts of a run have few different words.
const widths = new Map();
function widthOf(word) {
  let width = widths.get(word);
  if (width === undefined) widths.set(word, width = canvas.measureText(word).width);
  return width;
}

const hasCaptions = () => view.group !== "prompt" && prompts.size > 1;
const captionHeight = (captions) => Math.round(((captions ? 0.3 + 1.27 : 0.2) + 1.04 + 0.1) * metrics.rem);
/** Adds a tile to the line that comes next. Returns its index. */
const addTile = (row) => tiles.push({ row, line: lines.length }) - 1;

/** Tiles side by side, as many as the window is wide. */
function layOutTiles(extent) {
  const gap = metrics.narrow ? 8 : 16;
  const columns = Math.max(2, Math.floor((metrics.width + gap) / (view.size + gap)));
  const width = Math.floor((metrics.width - gap * (columns - 1)) / columns);
  const captions = hasCaptions();
  const pictureHeight = Math.round(width / metrics.aspect);
  const height = pictureHeight + captionHeight(captions) + (metrics.narrow ? 12 : 18);
  for (const [value, members] of groups()) {
    addTitle(extent, value, members);
    for (let start = 0; start < members.length; start += columns) {
      const cells = members.slice(start, start + columns).map(addTile);
      lines.push({ kind: "tiles", top: extent.top, height, cells, width, gap, pictureHeight, captions });
      extent.top += height;
    }
  }
}

/** An X/Y grid for each group, all with the same columns; where a cell has several rows, several lines. */
function layOutGrid(extent) {
  const across = axisOf.get(view.across), down = axisOf.get(view.down);
  const present = new Set(shown.map((row) => across.get(row) ?? ""));
  const xs = across.order.filter((value) => present.has(value));
  const gap = metrics.narrow ? 6 : 12;
  const labelWidth = !metrics.narrow && (down || xs.length) ? Math.round(7.5 * metrics.rem) : 0;
  const room = (metrics.width - labelWidth - gap * (xs.length - 1)) / Math.max(1, xs.length);
  const width = Math.floor(Math.max(metrics.narrow ? 72 : 96, Math.min(view.size * 1.3, room)));
  const pictureHeight = Math.round(width / metrics.aspect);
  const captions = hasCaptions();
  const height = pictureHeight + captionHeight(captions) + gap;
  extent.width = Math.max(extent.width, labelWidth + xs.length * (width + gap) - gap);
  fillColumns(across, xs, { labelWidth, width, gap });
  for (const [value, members] of groups()) {
    addTitle(extent, value, members);
    const table = tableOf(members, across, down);
    for (const y of down ? down.order.filter((each) => table.has(each)) : [""]) {
      const cells = xs.map((x) => table.get(y).get(x) ?? []);
      const label = down ? { name: down.label, value: y || "–" } : null;
      if (label && !labelWidth) addLabel(extent, label);
      for (let layer = 0; layer < Math.max(...cells.map((cell) => cell.length)); layer++) {
        const layerTiles = cells.map((cell) => (layer < cell.length ? addTile(cell[layer]) : -1));
        lines.push({ kind: "tiles", top: extent.top, height, cells: layerTiles, width, gap, pictureHeight, captions,
          labelWidth, label: labelWidth && layer === 0 ? label : null });
        extent.top += height;
      }
    }
  }
}

/** Rows by their value of `down` (none: ""), then by their value of `across`. */
function tableOf(members, across, down) {
  const table = new Map();
  for (const row of members) {
    const y = down ? down.get(row) ?? "" : "", x = across.get(row) ?? "";
    if (!table.has(y)) table.set(y, new Map());
    if (!table.get(y).has(x)) table.get(y).set(x, []);
    table.get(y).get(x).push(row);
  }
  return table;
}

function addLabel(extent, label) {
  const height = Math.round(1.5 * metrics.rem);
  lines.push({ kind: "label", top: extent.top, height, label });
  extent.top += height;
}

function fillColumns(across, xs, { labelWidth, width, gap }) {
  const name = make("span", "axis", metrics.narrow ? "" : across.label);
  name.style.width = `${labelWidth + metrics.margin}px`;
  name.hidden = !labelWidth;
  $("columns").replaceChildren(name, ...xs.map((x, index) => {
    const value = make("bdi", "value", metrics.narrow && index === 0 ? `${across.label} ${x || "–"}` : x || "–");
    value.title = `${across.label}: ${x || "–"}`;
    value.style.width = `${width}px`;
    value.style.marginRight = index < xs.length - 1 ? `${gap}px` : "0";
    return value;
  }));
}
