// Drawing. Only the lines in and near the window are in the document, so that a page of 20,000 pictures is as
// quick as one of 100.

/** The elements of the lines that are drawn, by the line's index. */
let drawn = new Map();

function removeDrawn() {
  for (const element of drawn.values()) element.remove();
  drawn = new Map();
}

/** The index of the first line that reaches below `y`, CSS pixels from the top of the grid. */
function firstLineBelow(y) {
  let low = 0, high = lines.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (lines[middle].top + lines[middle].height <= y) low = middle + 1; else high = middle;
  }
  return low;
}

/** Draws the lines that came near the window and removes those that left it. */
function draw() {
  const top = scroller.scrollTop - grid.offsetTop, height = scroller.clientHeight;
  const from = firstLineBelow(top - height * 0.6), until = top + height * 1.6;
  const wanted = new Set();
  for (let index = from; index < lines.length && lines[index].top < until; index++) wanted.add(index);
  for (const [index, element] of drawn) {
    // The line with the focus stays, or the keyboard would lose its position.
    if (!wanted.has(index) && !element.contains(document.activeElement)) {
      element.remove();
      drawn.delete(index);
    }
  }
  for (const index of wanted) {
    if (drawn.has(index)) continue;
    const element = drawLine(lines[index], index);
    drawn.set(index, element);
    grid.append(element);
  }
}

function drawLine(line, index) {
  const element = make("div", `line ${line.kind}${line.ruled ? " rule" : ""}`);
  element.setAttribute("role", "row");
  element.setAttribute("aria-rowindex", index + 1);
  element.style.transform = `translateY(${line.top}px)`;
  element.style.height = `${line.height}px`;
  if (line.kind === "title") drawTitle(element, line);
  else if (line.kind === "label") element.append(drawLabel(line.label));
  else drawTiles(element, line);
  return element;
}

function drawTitle(element, line) {
  const head = make("div", "head");
  const holder = make("div");
  holder.setAttribute("role", "rowheader");
  const heading = make("h2", "", line.text);
  heading.dir = "auto";
  heading.title = line.text;
  heading.style.maxWidth = `${line.room + 1}px`;
  holder.append(heading);
  element.style.paddingBottom = `${0.6 * metrics.rem}px`;
  head.append(holder, make("span", "", format.format(line.count)));
  element.append(head);
}

function drawLabel({ name, value }) {
  const label = make("div", "row-label");
  label.setAttribute("role", "rowheader");
  label.append(make("i", "", name), make("bdi", "", value));
  return label;
}

function drawTiles(element, line) {
  element.style.gap = `${line.gap}px`;
  if (line.labelWidth) {
    const label = line.label ? drawLabel(line.label) : make("div", "row-label");
    label.style.width = `${line.labelWidth + metrics.margin}px`;
    label.style.marginRight = `${-line.gap}px`;
    element.append(label);
  }
  for (const index of line.cells) {
    const cell = make("div", "cell");
    cell.setAttribute("role", "gridcell");
    cell.style.width = `${line.width}px`;
    if (index >= 0) cell.append(drawTile(index, line));
    element.append(cell);
  }
}

// A seed that all rows share needs no line under each picture.
const seedsVary = rows.some((row) => row.seed !== rows[0].seed);

function drawTile(index, line) {
  const { row } = tiles[index];
  const tile = make("button", "tile");
  tile.type = "button";
  tile.tabIndex = index === cursor ? 0 : -1;
  tile.dataset.index = index;
  tile.append(drawPicture(row, line.pictureHeight));
  if (line.captions) {
    const caption = make("bdi", "caption", row.prompt ?? "");
    caption.dir = "auto";
    tile.append(caption);
  }
  const numbers = make("span", "numbers");
  numbers.append(make("span", "", format.format(row.number)));
  if (row.seed && seedsVary && line.width > 84) numbers.append(make("span", "", `seed ${row.seed}`));
  tile.append(numbers);
  return tile;
}

/** A picture in words, for those who do not see it; in a grid also its row and column. */
function describe(row) {
  const values = [view.across, view.down].map((id) => axisOf.get(id)).filter(Boolean)
    .map((axis) => `, ${axis.label} ${axis.get(row) ?? "–"}`);
  return (row.prompt ?? `Picture ${row.number}`).slice(0, 300) + values.join("");
}

// Thumbnails are in blocks of JSON after this script. A few parsed blocks are kept.
const blocks = new Map();

/** A row's thumbnail as a data: address; undefined where it has none, or the page has not loaded so far. */
function thumbnail(row) {
  if (!about.thumbs_per_block) return undefined;
  const number = Math.floor(row.index / about.thumbs_per_block);
  let block = blocks.get(number);
  if (!block) {
    const text = $(`thumbs-${number}`)?.textContent;
    if (text === undefined) return undefined;
    block = JSON.parse(text);
    blocks.set(number, block);
    if (blocks.size > 24) blocks.delete(blocks.keys().next().value);
  }
  const data = block[row.index % about.thumbs_per_block];
  return data ? `data:image/webp;base64,${data}` : undefined;
}

grid.addEventListener("error", (event) => {
  const image = event.target;
  if (image.tagName !== "IMG" || image.classList.contains("broken")) return;
  image.classList.add("broken");
  image.after(makeNote("not loaded", expired() ? "Its link has expired." : "Its link does not answer.", true));
}, true);
