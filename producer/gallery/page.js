
"use strict";
// The contact sheet. The rows are JSON blocks above; thumbnails, if any, are JSON blocks below, read when
// they come into sight. Only the lines in sight are in the document, so 10,000 pictures cost what 100 do.
// All data is set as text, never as markup: the page's policy forbids the other ways.
(() => {
  const $ = (id) => document.getElementById(id);
  const make = (tag, name, text) => {
    const element = document.createElement(tag);
    if (name) element.className = name;
    if (text !== undefined) element.textContent = text;
    return element;
  };
  const facts = JSON.parse($("facts").textContent);
  const rows = [];
  for (const block of document.querySelectorAll("script.rows")) {
    for (const row of JSON.parse(block.textContent)) rows.push(row);
    block.remove();
  }
  rows.forEach((row, index) => { row.index = index; });
  // A manifest is in order already; what was found in a bucket is ordered by when it was put there.
  rows.sort((a, b) => (a.at ?? 0) - (b.at ?? 0) || a.index - b.index);
  rows.forEach((row, place) => { row.number = place + 1; });

  const LABELS = {
    negative_prompt: "Negative prompt", seed: "Seed", size: "Size", steps: "Steps", guidance_scale: "Guidance",
    scheduler: "Scheduler", model: "Model", revision: "Revision", format: "Format",
  };
  //: Values that a field may have and still be something to group by or to cross.
  const MOST_VALUES = 40;
  const scroller = $("scroller"), sheet = $("sheet"), viewer = $("viewer"), filter = $("filter");
  const number = new Intl.NumberFormat("en");
  const many = (count, one) => `${number.format(count)} ${one}${count === 1 ? "" : "s"}`;

  // ---- What can be grouped by: the axes that were crossed, then every field that varies a little. ----

  const axes = findAxes();
  const byId = new Map(axes.map((axis) => [axis.id, axis]));

  function findAxes() {
    const sources = new Map();
    const note = (id, label, kind, get) => {
      if (!sources.has(id)) sources.set(id, { id, label, kind, get, values: new Map() });
    };
    for (const row of rows) {
      for (const name of Object.keys(row.grid ?? {})) {
        note(`axis:${name}`, LABELS[name] ?? name, "axis", (each) => each.grid?.[name] ?? each[name]);
      }
    }
    for (const name of Object.keys(LABELS)) {
      if (!sources.has(`axis:${name}`)) note(`field:${name}`, LABELS[name], "field", (each) => each[name]);
    }
    for (const row of rows) {
      for (const name of Object.keys(row.metadata ?? {})) {
        if (!sources.has(`axis:${name}`)) note(`meta:${name}`, name, "field", (each) => each.metadata?.[name]);
      }
    }
    for (const axis of sources.values()) {
      for (const row of rows) {
        const value = axis.get(row) ?? "";
        axis.values.set(value, (axis.values.get(value) ?? 0) + 1);
        if (axis.values.size > MOST_VALUES && axis.kind !== "axis") break;
      }
      axis.order = inOrder([...axis.values.keys()], axis.kind);
    }
    return [...sources.values()].filter((axis) => axis.values.size > 1 &&
      (axis.kind === "axis" || axis.values.size <= Math.min(MOST_VALUES, rows.length - 1)));
  }

  /** Numbers by size, "512x768" by its first number; words of an axis as they were given, others by letter. */
  function inOrder(values, kind) {
    const told = values.filter((value) => value !== "");
    const numeric = told.length && told.every((value) => /^-?[\d.]+(x\d+)?$/.test(value));
    if (numeric) told.sort((a, b) => parseFloat(a) - parseFloat(b) || a.localeCompare(b, "en", { numeric: true }));
    else if (kind !== "axis") told.sort((a, b) => a.localeCompare(b, "en", { numeric: true }));
    return told.length < values.length ? [...told, ""] : told;
  }

  const prompts = new Set(rows.map((row) => row.prompt));
  // A seed that all share is not worth a line under each picture.
  const seedsVary = rows.some((row) => row.seed !== rows[0].seed);
  const view = { query: "", group: "", across: "", down: "", size: 184 };

  function chooseView() {
    const crossed = axes.filter((axis) => axis.kind === "axis");
    if (prompts.size <= rows.length / 2) view.group = "prompt";
    if (crossed.length) {
      view.across = crossed[0].id;
      view.down = crossed[1]?.id ?? "";
    }
  }

  function fillSelects() {
    const add = (select, id, label) => {
      const option = make("option", "", label);
      option.value = id;
      select.append(option);
    };
    for (const id of ["group", "across", "down"]) add($(id), "", "none");
    if (prompts.size > 1 || view.group) add($("group"), "prompt", "Prompt");
    for (const axis of axes) for (const id of ["group", "across", "down"]) add($(id), axis.id, axis.label);
    for (const id of ["group", "across", "down"]) {
      $(id).value = view[id];
      $(id).parentElement.hidden = $(id).length < 2;
      $(id).addEventListener("change", () => { view[id] = $(id).value; arrange(); });
    }
    $("down").disabled = !view.across;
  }

  // ---- The filter: all words must be in a picture's text; "a phrase", -without, field:value. ----

  const FIELDS = new Set([...Object.keys(LABELS), "id", "state", "prompt", "error"]);

  function haystack(row) {
    row.text ??= [row.prompt, row.negative_prompt, row.id, row.seed, row.size, row.scheduler, row.model, row.state,
      row.error_type, row.error, ...Object.values(row.grid ?? {}), ...Object.values(row.metadata ?? {})]
      .filter(Boolean).join("\n").toLowerCase();
    return row.text;
  }

  // Built in idle moments, so that the first letter typed is as fast as the others.
  function prepareHaystacks(from = 0) {
    for (const row of rows.slice(from, from + 200)) haystack(row);
    if (from + 200 < rows.length) whenIdle(() => prepareHaystacks(from + 200));
  }
  const whenIdle = (work) => (window.requestIdleCallback ?? setTimeout)(work);

  function matcher(query) {
    const tests = [];
    for (const [, not, field, phrase, word] of
      query.toLowerCase().matchAll(/(-?)(?:([a-z_]+):)?(?:"([^"]*)"?|(\S+))/g)) {
      const known = field && FIELDS.has(field);
      const wanted = (known || !field ? "" : `${field}:`) + (phrase ?? word);
      if (wanted === "") continue;
      const exact = known && !["prompt", "negative_prompt", "error", "id", "model", "revision"].includes(field);
      const test = !known ? (row) => haystack(row).includes(wanted)
        : exact ? (row) => String(row[field] ?? "").toLowerCase() === wanted
        : (row) => String(row[field] ?? "").toLowerCase().includes(wanted);
      tests.push(not ? (row) => !test(row) : test);
    }
    return (row) => tests.every((test) => test(row));
  }

  // ---- Layout: lines with a place and a height, and the order in which the keys walk. ----

  let lines = [], order = [], live = new Map(), cursor = 0, metrics = {}, shown = rows;
  const pencil = document.createElement("canvas").getContext("2d");

  function measure() {
    const rem = parseFloat(getComputedStyle(document.documentElement).fontSize);
    const margin = parseFloat(getComputedStyle(document.querySelector("header")).paddingLeft);
    const width = Math.max(200, scroller.clientWidth - 2 * margin);
    const narrow = width < 36 * rem;
    const shapes = new Map();
    for (const row of rows) if (row.size) shapes.set(row.size, (shapes.get(row.size) ?? 0) + 1);
    const [common] = [...shapes].sort((a, b) => b[1] - a[1])[0] ?? ["1x1"];
    const [wide, high] = common.split("x").map(Number);
    // A font that the canvas knows by the same name as the page: for counting the lines of a title.
    pencil.font = `${1.1875 * rem}px ${getComputedStyle(document.querySelector("h1")).fontFamily}`;
    return { rem, margin, width, narrow, space: pencil.measureText(" ").width, aspect: Math.min(2.4, Math.max(0.42, wide / high || 1)) };
  }

  function arrange() {
    const anchor = lines.length ? anchorOf() : null;
    metrics = measure();
    shown = view.query.trim() ? rows.filter(matcher(view.query)) : rows;
    if (view.down === view.across) view.down = "";
    $("down").value = view.down;
    $("down").disabled = !view.across;
    for (const element of live.values()) element.remove();
    live = new Map();
    lines = [];
    order = [];
    const plan = { top: view.across ? 8 : 14, width: metrics.width };
    if (view.across) crossLines(plan); else tileLines(plan);
    sheet.style.height = `${plan.top}px`;
    sheet.style.width = `${plan.width + 2 * metrics.margin}px`;
    sheet.setAttribute("aria-rowcount", lines.length);
    $("columns").hidden = !view.across || !shown.length;
    $("nothing").hidden = shown.length > 0;
    showCount();
    cursor = Math.min(cursor, Math.max(0, order.length - 1));
    if (anchor !== null && !view.query) restore(anchor);
    render();
  }

  function showCount() {
    const all = shown.length === rows.length;
    $("count").textContent = all ? "" : `${number.format(shown.length)} of ${number.format(rows.length)}`;
  }

  function groups() {
    if (!view.group) return [["", shown]];
    const get = view.group === "prompt" ? (row) => row.prompt ?? "" : byId.get(view.group).get;
    const found = new Map();
    for (const row of shown) {
      const key = get(row) ?? "";
      if (!found.has(key)) found.set(key, []);
      found.get(key).push(row);
    }
    if (view.group === "prompt") return [...found];
    return byId.get(view.group).order.filter((key) => found.has(key)).map((key) => [key, found.get(key)]);
  }

  function titleLine(plan, key, members) {
    if (!view.group) return;
    const named = view.group === "prompt" ? key || "(no prompt)" : `${byId.get(view.group).label}: ${key || "–"}`;
    const room = Math.min(46 * metrics.rem, metrics.width - 3.5 * metrics.rem);
    const rowsOfText = Math.min(3, linesOf(named, room));
    const gap = lines.length ? 2.6 : 0.7;
    const height = Math.round((gap + rowsOfText * 1.604 + 0.6) * metrics.rem);
    lines.push({ kind: "title", top: plan.top, height, text: named, room, count: members.length, ruled: lines.length > 0 });
    plan.top += height;
  }

  /** Lines that a title takes in `room` pixels: words as the browser breaks them, long ones anywhere. */
  function linesOf(text, room) {
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

  // Runs have many prompts and few words, and measuring is slow.
  const widths = new Map();
  function widthOf(word) {
    let width = widths.get(word);
    if (width === undefined) widths.set(word, width = pencil.measureText(word).width);
    return width;
  }

  const hasWords = () => view.group !== "prompt" && prompts.size > 1;
  const captionHeight = (words) => Math.round(((words ? 0.3 + 1.27 : 0.2) + 1.04 + 0.1) * metrics.rem);

  function tileLines(plan) {
    const gap = metrics.narrow ? 8 : 16;
    const columns = Math.max(2, Math.floor((metrics.width + gap) / (view.size + gap)));
    const width = Math.floor((metrics.width - gap * (columns - 1)) / columns);
    const words = hasWords();
    const frame = Math.round(width / metrics.aspect);
    const height = frame + captionHeight(words) + (metrics.narrow ? 12 : 18);
    for (const [key, members] of groups()) {
      titleLine(plan, key, members);
      for (let start = 0; start < members.length; start += columns) {
        const cells = members.slice(start, start + columns).map((row) => order.push({ row, line: lines.length }) - 1);
        lines.push({ kind: "tiles", top: plan.top, height, cells, width, gap, frame, words });
        plan.top += height;
      }
    }
  }

  /** An X/Y grid a group: the same columns for all of them; several seeds in a cell are lines of their own. */
  function crossLines(plan) {
    const across = byId.get(view.across), down = byId.get(view.down);
    const present = new Set(shown.map((row) => across.get(row) ?? ""));
    const xs = across.order.filter((value) => present.has(value));
    const gap = metrics.narrow ? 6 : 12;
    const label = !metrics.narrow && (down || xs.length) ? Math.round(7.5 * metrics.rem) : 0;
    const room = (metrics.width - label - gap * (xs.length - 1)) / Math.max(1, xs.length);
    const width = Math.floor(Math.max(metrics.narrow ? 72 : 96, Math.min(view.size * 1.3, room)));
    const frame = Math.round(width / metrics.aspect);
    const words = hasWords();
    plan.width = Math.max(plan.width, label + xs.length * (width + gap) - gap);
    fillColumns(across, xs, { label, width, gap });
    for (const [key, members] of groups()) {
      titleLine(plan, key, members);
      const table = new Map();
      for (const row of members) {
        const y = down ? down.get(row) ?? "" : "", x = across.get(row) ?? "";
        if (!table.has(y)) table.set(y, new Map());
        if (!table.get(y).has(x)) table.get(y).set(x, []);
        table.get(y).get(x).push(row);
      }
      for (const y of down ? down.order.filter((value) => table.has(value)) : [""]) {
        const cells = xs.map((x) => table.get(y).get(x) ?? []);
        const told = down ? { name: down.label, value: y || "–" } : null;
        if (told && !label) {
          const height = Math.round(1.5 * metrics.rem);
          lines.push({ kind: "label", top: plan.top, height, told });
          plan.top += height;
        }
        const height = frame + captionHeight(words) + gap;
        for (let layer = 0; layer < Math.max(...cells.map((cell) => cell.length)); layer++) {
          const places = cells.map((cell) =>
            layer < cell.length ? order.push({ row: cell[layer], line: lines.length }) - 1 : -1);
          lines.push({ kind: "tiles", top: plan.top, height, cells: places, width, gap, frame, words, label,
            told: label && layer === 0 ? told : null });
          plan.top += height;
        }
      }
    }
  }

  function fillColumns(across, xs, { label, width, gap }) {
    const head = $("columns");
    const name = make("span", "axis", metrics.narrow ? "" : across.label);
    name.style.width = `${label + metrics.margin}px`;
    name.hidden = !label;
    head.replaceChildren(name, ...xs.map((x, index) => {
      const value = make("bdi", "value", metrics.narrow && index === 0 ? `${across.label} ${x || "–"}` : x || "–");
      value.title = `${across.label}: ${x || "–"}`;
      value.style.width = `${width}px`;
      value.style.marginRight = index < xs.length - 1 ? `${gap}px` : "0";
      return value;
    }));
  }

  // ---- Rendering: the lines near the window, and no others. ----

  function firstAt(y) {
    let low = 0, high = lines.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (lines[middle].top + lines[middle].height <= y) low = middle + 1; else high = middle;
    }
    return low;
  }

  function render() {
    const top = scroller.scrollTop - sheet.offsetTop, height = scroller.clientHeight;
    const from = firstAt(top - height * 0.6), until = top + height * 1.6;
    const wanted = new Set();
    for (let index = from; index < lines.length && lines[index].top < until; index++) wanted.add(index);
    for (const [index, element] of live) {
      // A line with the focus stays, or the keyboard would lose its place.
      if (!wanted.has(index) && !element.contains(document.activeElement)) {
        element.remove();
        live.delete(index);
      }
    }
    for (const index of wanted) {
      if (live.has(index)) continue;
      const element = drawLine(lines[index], index);
      live.set(index, element);
      sheet.append(element);
    }
  }

  function drawLine(line, index) {
    const element = make("div", `line ${line.kind}${line.ruled ? " rule" : ""}`);
    element.setAttribute("role", "row");
    element.setAttribute("aria-rowindex", index + 1);
    element.style.transform = `translateY(${line.top}px)`;
    element.style.height = `${line.height}px`;
    if (line.kind === "title") drawTitle(element, line);
    else if (line.kind === "label") element.append(drawLabel(line.told));
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
    head.append(holder, make("span", "", number.format(line.count)));
    element.append(head);
  }

  function drawLabel(told) {
    const label = make("div", "row-label");
    label.setAttribute("role", "rowheader");
    label.append(make("i", "", told.name), make("bdi", "", told.value));
    return label;
  }

  function drawTiles(element, line) {
    element.style.gap = `${line.gap}px`;
    if (line.label) {
      const label = line.told ? drawLabel(line.told) : make("div", "row-label");
      label.style.width = `${line.label + metrics.margin}px`;
      label.style.marginRight = `${-line.gap}px`;
      element.append(label);
    }
    for (const place of line.cells) {
      const cell = make("div", "cell");
      cell.setAttribute("role", "gridcell");
      cell.style.width = `${line.width}px`;
      if (place >= 0) cell.append(drawTile(place, line));
      element.append(cell);
    }
  }

  function drawTile(place, line) {
    const { row } = order[place];
    const tile = make("button", "tile");
    tile.type = "button";
    tile.tabIndex = place === cursor ? 0 : -1;
    tile.dataset.place = place;
    const frame = make("span", "frame");
    frame.style.height = `${line.frame}px`;
    const source = thumbnail(row) ?? row.url;
    if (source) {
      const image = make("img");
      image.alt = alt(row);
      image.loading = "lazy";
      image.decoding = "async";
      image.src = source;
      frame.append(image);
    } else {
      frame.append(say(row.state, row.error ?? (row.state === "done" ? "Its picture was not found." : ""), row.state !== "failed"));
    }
    tile.append(frame);
    if (line.words) {
      const words = make("bdi", "words", row.prompt ?? "");
      words.dir = "auto";
      tile.append(words);
    }
    const numbers = make("span", "numbers");
    numbers.append(make("span", "", number.format(row.number)));
    if (row.seed && seedsVary && line.width > 84) numbers.append(make("span", "", `seed ${row.seed}`));
    tile.append(numbers);
    return tile;
  }

  function say(title, text, quiet) {
    const said = make("span", quiet ? "said quiet" : "said");
    const bdi = make("bdi", "", text);
    said.append(make("b", "", title), bdi);
    return said;
  }

  /** What a picture is, in words; in a grid also where it stands. */
  function alt(row) {
    const places = [view.across, view.down].map((id) => byId.get(id)).filter(Boolean)
      .map((axis) => `, ${axis.label} ${axis.get(row) ?? "–"}`);
    return (row.prompt ?? `Picture ${row.number}`).slice(0, 300) + places.join("");
  }

  // Thumbnails lie in blocks of JSON; a few blocks are kept open.
  const blocks = new Map();
  function thumbnail(row) {
    if (!facts.thumbs_in_block) return undefined;
    const name = Math.floor(row.index / facts.thumbs_in_block);
    let block = blocks.get(name);
    if (!block) {
      const text = $(`thumbs-${name}`)?.textContent;
      // Not there yet: the page is still loading.
      if (text === undefined) return undefined;
      block = JSON.parse(text);
      blocks.set(name, block);
      if (blocks.size > 24) blocks.delete(blocks.keys().next().value);
    }
    const data = block[row.index % facts.thumbs_in_block];
    return data ? `data:image/webp;base64,${data}` : undefined;
  }

  sheet.addEventListener("error", (event) => {
    const image = event.target;
    if (image.tagName !== "IMG" || image.classList.contains("broken")) return;
    image.classList.add("broken");
    image.after(say("not loaded", expired() ? "Its link has expired." : "Its link does not answer.", true));
  }, true);

  // ---- Moving about. ----

  const anchorOf = () => {
    const line = lines[firstAt(scroller.scrollTop - sheet.offsetTop)];
    const place = line?.cells?.find((each) => each >= 0);
    return scroller.scrollTop > sheet.offsetTop && place !== undefined ? order[place].row : null;
  };

  function restore(row) {
    const place = order.findIndex((each) => each.row === row);
    if (place >= 0) scroller.scrollTop = sheet.offsetTop + lines[order[place].line].top - barHeight();
  }

  const barHeight = () => $("bar").offsetHeight + ($("columns").hidden ? 0 : $("columns").offsetHeight);

  function moveTo(place, focus = true) {
    if (place < 0 || place >= order.length) return;
    sheet.querySelector(`[data-place="${cursor}"]`)?.setAttribute("tabindex", "-1");
    cursor = place;
    const line = lines[order[place].line];
    const top = sheet.offsetTop + line.top, above = scroller.scrollTop + barHeight();
    if (top < above) scroller.scrollTop = top - barHeight() - 8;
    else if (top + line.height > scroller.scrollTop + scroller.clientHeight) {
      scroller.scrollTop = top + line.height - scroller.clientHeight + 8;
    }
    render();
    const tile = sheet.querySelector(`[data-place="${place}"]`);
    tile.tabIndex = 0;
    if (focus) tile.focus({ preventScroll: true });
    if (view.across) tile.scrollIntoView({ block: "nearest", inline: "nearest" });
  }

  /** The picture above or below: the nearest column of the next line with pictures. */
  function vertical(step) {
    const here = lines[order[cursor].line], column = here.cells.indexOf(cursor);
    for (let index = order[cursor].line + step; lines[index]; index += step) {
      const places = (lines[index].cells ?? []).map((place, at) => [place, Math.abs(at - column)])
        .filter(([place]) => place >= 0).sort((a, b) => a[1] - b[1]);
      if (places.length) return places[0][0];
    }
    return cursor;
  }

  function sheetKey(event) {
    const moves = {
      ArrowRight: () => cursor + 1, ArrowLeft: () => cursor - 1, ArrowDown: () => vertical(1),
      ArrowUp: () => vertical(-1), Home: () => 0, End: () => order.length - 1,
    };
    const move = moves[event.key];
    if (!move || !order.length) return;
    event.preventDefault();
    // The first arrow after a click elsewhere shows where the cursor is.
    moveTo(document.activeElement?.classList.contains("tile") ? move() : Math.min(cursor, order.length - 1));
  }

  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const typing = event.target === filter;
    if (viewer.open) return viewerKey(event);
    if (event.key === "Escape" && typing) {
      event.preventDefault();
      if (filter.value) setFilter(""); else scroller.focus();
    } else if (event.key === "/" && !typing) {
      event.preventDefault();
      filter.focus();
      filter.select();
    } else if (event.key === "ArrowDown" && typing && order.length) {
      event.preventDefault();
      moveTo(cursor);
    } else if (!["INPUT", "SELECT"].includes(event.target.tagName)) {
      if (event.key === "c" && event.target.classList.contains("tile")) copy(order[cursor].row);
      else sheetKey(event);
    }
    return undefined;
  });

  sheet.addEventListener("click", (event) => {
    const tile = event.target.closest(".tile");
    if (tile) openViewer(Number(tile.dataset.place));
  });

  // ---- One picture. ----

  let current = -1;

  function openViewer(place) {
    moveTo(place, false);
    if (!viewer.open) viewer.showModal();
    showPicture(place);
    $("close").focus();
  }

  function showPicture(place) {
    current = place;
    const { row } = order[place];
    history.replaceState(null, "", row.id ? `#${row.id}` : "#");
    $("viewer-place").textContent = `${number.format(place + 1)} of ${number.format(order.length)}`;
    $("viewer-prompt").textContent = row.prompt ?? "(no prompt)";
    $("viewer-negative").textContent = row.negative_prompt ? `without ${row.negative_prompt}` : "";
    $("viewer-error").textContent = [row.error, ...(row.warnings ?? [])].filter(Boolean).join(" ");
    $("copy").hidden = $("viewer-text").hidden = !row.parameters;
    $("viewer-parameters").textContent = row.parameters ?? "";
    $("open").hidden = !row.url;
    if (row.url) $("open").href = row.url; else $("open").removeAttribute("href");
    $("previous").disabled = place === 0;
    $("next").disabled = place === order.length - 1;
    $("viewer-facts").replaceChildren(...papers(row).flatMap(([name, value]) => {
      const text = make("dd");
      text.append(make("bdi", "", value));
      return [make("dt", "", name), text];
    }));
    viewer.querySelector(".papers").scrollTop = 0;
    viewer.scrollTop = 0;
    loadPicture(row, place);
  }

  function papers(row) {
    const seconds = (value) => `${value} s`;
    const found = [["Number", number.format(row.number)]];
    if (row.line) found.push(["Line", row.line]);
    found.push(["State", row.state]);
    if (row.error_type) found.push(["Error", row.error_type]);
    for (const [name, label] of Object.entries(LABELS)) {
      if (name !== "negative_prompt" && row[name]) found.push([label, row[name].replace(/^(\d+)x(\d+)$/, "$1 × $2")]);
    }
    for (const [name, value] of Object.entries(row.grid ?? {})) if (!(name in LABELS)) found.push([name, value]);
    for (const [name, value] of Object.entries(row.metadata ?? {})) found.push([name, value]);
    for (const [name, value] of Object.entries(row.timings ?? {})) {
      found.push([name[0].toUpperCase() + name.slice(1), seconds(value)]);
    }
    if (row.nsfw) found.push(["Safety checker", "flagged"]);
    if (row.worker) found.push(["Worker", row.worker]);
    if (row.id) found.push(["Id", row.id]);
    if (row.uri) found.push(["Address", row.uri]);
    return found;
  }

  function loadPicture(row, place) {
    const image = $("viewer-image"), note = $("viewer-note");
    const small = thumbnail(row);
    const [width, height] = (row.size ?? "").split("x").map(Number);
    image.alt = alt(row);
    note.textContent = "";
    image.classList.remove("broken");
    // A small picture is not blown up beyond what it can bear.
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
      if (current !== place) return;
      if (small) image.src = full.src;
      for (const near of [place + 1, place - 1]) if (order[near]?.row.url) new Image().src = order[near].row.url;
    };
    full.onerror = () => {
      if (current !== place) return;
      if (!small) image.classList.add("broken");
      note.textContent = `${expired() ? "The link to the full picture has expired" : "The full picture is out of reach"}. It lies at ${row.uri}.`;
    };
    if (row.url) full.src = row.url;
  }

  function viewerKey(event) {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (step && order[current + step]) {
      event.preventDefault();
      showPicture(current + step);
    } else if (event.key === "c") copy(order[current].row);
  }

  async function copy(row) {
    if (!row.parameters) return;
    let done = true;
    try {
      await navigator.clipboard.writeText(row.parameters);
    } catch {
      // Not a secure address, or no leave to: the old way, from inside the dialog, where focus is allowed.
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

  $("previous").addEventListener("click", () => showPicture(current - 1));
  $("next").addEventListener("click", () => showPicture(current + 1));
  $("copy").addEventListener("click", () => copy(order[current].row));
  $("close").addEventListener("click", () => viewer.close());
  viewer.addEventListener("close", () => {
    history.replaceState(null, "", location.href.split("#")[0]);
    $("viewer-image").removeAttribute("src");
    const place = current;
    current = -1;
    moveTo(place);
  });
  let touchedAt = null;
  viewer.querySelector(".stage").addEventListener("pointerdown", (event) => { touchedAt = event.clientX; });
  viewer.querySelector(".stage").addEventListener("pointerup", (event) => {
    const moved = event.pointerType === "touch" && touchedAt !== null ? event.clientX - touchedAt : 0;
    const place = current - Math.sign(moved);
    if (Math.abs(moved) > 48 && order[place]) showPicture(place);
  });

  // ---- The head of the page. ----

  const expired = () => facts.expires_at !== null && Date.now() > facts.expires_at * 1000;
  const when = (seconds) => new Date(seconds * 1000).toLocaleString("en-GB", { dateStyle: "long", timeStyle: "short" });

  function writeHead() {
    const summary = $("summary");
    const counts = new Map();
    for (const row of rows) counts.set(row.state, (counts.get(row.state) ?? 0) + 1);
    const parts = [document.createTextNode(many(counts.get("done") ?? 0, "picture"))];
    for (const [state, count] of counts) {
      if (state === "done") continue;
      const button = make("button", state === "failed" ? "failures" : "", `${number.format(count)} ${state}`);
      button.type = "button";
      button.addEventListener("click", () => setFilter(filter.value === `state:${state}` ? "" : `state:${state}`));
      parts.push(button);
    }
    if (prompts.size > 1) parts.push(document.createTextNode(many(prompts.size, "prompt")));
    parts.push(document.createTextNode(`made ${when(facts.made_at)}`));
    if (facts.expires_at !== null && !expired()) {
      const until = `${facts.temporary_keys ? "at most until" : "until"} ${when(facts.expires_at)}`;
      parts.push(document.createTextNode(facts.thumbs_in_block ? `full pictures open ${until}` : `links work ${until}`));
    }
    parts.forEach((part, index) => summary.append(...(index ? [" · ", part] : [part])));
    const notices = [...facts.notices];
    if (expired()) notices.unshift(`The links on this page expired on ${when(facts.expires_at)}: make it again with \`${facts.command}\`.`);
    $("notice").textContent = notices.join(" ");
    $("notice").hidden = !notices.length;
  }

  function setFilter(text) {
    filter.value = text;
    view.query = text;
    arrange();
  }

  let waiting = false;
  scroller.addEventListener("scroll", () => {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => { waiting = false; render(); });
  }, { passive: true });
  filter.addEventListener("input", () => { view.query = filter.value; scrollToSheet(); arrange(); });
  const scrollToSheet = () => { scroller.scrollTop = Math.min(scroller.scrollTop, $("bar").offsetTop); };
  $("bar").addEventListener("submit", (event) => event.preventDefault());
  $("clear").addEventListener("click", () => { setFilter(""); filter.focus(); });
  $("size").addEventListener("input", () => { view.size = Number($("size").value); arrange(); });
  $("options-button").addEventListener("click", () => {
    const open = $("options").classList.toggle("open");
    $("options-button").setAttribute("aria-expanded", open);
  });
  $("theme").addEventListener("click", () => {
    const root = document.documentElement;
    const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
  });

  let lastWidth = 0;
  new ResizeObserver(() => {
    document.documentElement.style.setProperty("--bar", `${$("bar").offsetHeight}px`);
    if (scroller.clientWidth === lastWidth) return render();
    lastWidth = scroller.clientWidth;
    return arrange();
  }).observe(scroller);

  chooseView();
  fillSelects();
  if (matchMedia("(max-width: 46rem)").matches) { view.size = 104; $("size").value = 104; }
  writeHead();
  whenIdle(() => prepareHaystacks());
  lastWidth = scroller.clientWidth;
  arrange();
  new ResizeObserver(() => document.documentElement.style.setProperty("--bar", `${$("bar").offsetHeight}px`)).observe($("bar"));
  // Thumbnails come after this script: what was drawn without them is drawn again.
  if (facts.thumbs_in_block) document.addEventListener("DOMContentLoaded", arrange);
  const asked = location.hash.slice(1);
  const place = asked ? order.findIndex((each) => each.row.id === asked) : -1;
  if (place >= 0) openViewer(place);
})();
