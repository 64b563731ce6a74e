// What the page knows: who is signed in, the jobs, the workers. The other parts show it.

/** The fields of a job, in the order in which they are shown (see `producer.gallery.fields`). */
const fields = new Map(JSON.parse($("about").textContent).fields.map((field) => [field.name, field]));
const viewer = $("viewer");

/** Who is signed in and what he may do; `name` is empty while nobody is. */
let session = { name: "", scopes: [], proof: "", is_open: false };
const may = (scope) => session.scopes.includes(scope);

/** The rows of the latest jobs by id: all values that people see are texts. */
const jobs = new Map();
/** Queues and workers as they were read last; null: not yet. */
let fleet = null;
/** Everything that can be opened, in the order in which the arrow keys move. */
let tiles = [];
/** Seconds that this machine's clock is behind the server's, about. */
const ENDED = new Set(["done", "failed", "cancelled"]);

/** A path of a job's own API, with the caller's submission. */
const pathOf = (row, part = "", more = {}) => {
  const query = new URLSearchParams(row.submission ? { submission: row.submission, ...more } : more).toString();
  return `/v1/jobs/${row.id}${part}${query ? `?${query}` : ""}`;
};

/** Takes a row as the server sends it. */
function takeRow(row) {
  if (row.state === "done") row.url = pathOf(row, "/image", { redirect: "false" });
  jobs.set(row.id, row);
}

// What the viewer asks of a page.
const thumbnail = (row) => (row.state === "done" ? pathOf(row, "/thumbnail") : undefined);
const describe = (row) => (row.prompt ?? "A picture").slice(0, 300);
const expired = () => false;
const showCount = () => { $("count").textContent = ""; };

/** Puts the focus on what shows a tile. */
function moveTo(index, focus = true) {
  const element = tiles[index] && document.querySelector(`[data-job="${tiles[index].row.id}"]`);
  for (const each of document.querySelectorAll("#pictures .tile")) each.tabIndex = each === element ? 0 : -1;
  const first = document.querySelector("#pictures .tile");
  if (first && !document.querySelector('#pictures .tile[tabindex="0"]')) first.tabIndex = 0;
  if (element && focus) element.focus();
}

/** Shows a sentence at the top of the page; an empty one removes it. `what` tells sentences apart. */
const notices = new Map();
function notice(what, text) {
  if (text) notices.set(what, text); else notices.delete(what);
  const all = [...notices.values()].join(" ");
  if ($("notice").textContent !== all) $("notice").textContent = all;
  $("notice").hidden = !all;
}

/** Shows a text in an element, with what is in backticks as code. Returns the element. */
function say(element, text) {
  element.replaceChildren(...text.split("`").map((part, index) => (index % 2 ? make("code", "", part) : part)));
  return element;
}

/** Brings the children of `parent` into the order of `elements`, and moves none that is in its place. */
function arrange(parent, elements) {
  const wanted = new Set(elements);
  for (const child of [...parent.children]) if (!wanted.has(child)) child.remove();
  elements.forEach((element, index) => {
    if (parent.children[index] !== element) parent.insertBefore(element, parent.children[index] ?? null);
  });
}

/** A function that shows `items` in `parent`: an element for each key, made once and filled when it changes. */
function list(parent, keyOf, makeElement, fill) {
  const known = new Map();
  return (items) => {
    const keys = new Set(items.map(keyOf));
    for (const key of known.keys()) if (!keys.has(key)) known.delete(key);
    arrange(parent, items.map((item) => {
      const key = keyOf(item);
      let entry = known.get(key);
      if (!entry) known.set(key, entry = { element: makeElement(item), item: undefined });
      if (entry.item !== item) {
        entry.item = item;
        fill(entry.element, item);
      }
      return entry.element;
    }));
  };
}

/** Seconds since the epoch as a time of day; of another day with its date. */
const clock = (seconds) => {
  const date = new Date(seconds * 1000);
  const isToday = date.toDateString() === new Date().toDateString();
  return date.toLocaleString("en-GB", isToday ? { timeStyle: "short" } : { dateStyle: "medium", timeStyle: "short" });
};
