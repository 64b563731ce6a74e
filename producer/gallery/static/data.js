// What Python wrote into the page, and what follows from it.

/** About the page: when it was made, its notices, and the fields of a job (see `page.py`). */
const about = JSON.parse($("about").textContent);

/** One row a job, all of its values as text. */
const rows = [];
for (const block of document.querySelectorAll("script.rows")) {
  for (const row of JSON.parse(block.textContent)) rows.push(row);
  block.remove();
}
// `index`: the position in the file, by which a thumbnail is found. `number`: what people see, from 1.
rows.forEach((row, index) => { row.index = index; });
// A manifest is in order already. Jobs that were found in a bucket are ordered by when they were stored.
rows.sort((a, b) => (a.at ?? 0) - (b.at ?? 0) || a.index - b.index);
rows.forEach((row, position) => { row.number = position + 1; });

/** The fields of a job, in the order in which they are shown: name, label, exact, searched, default. */
const fields = new Map(about.fields.map((field) => [field.name, field]));
const labelOf = (name) => fields.get(name)?.label ?? name;
/** A row's value of a field; undefined where it has none. Rows leave out values that are the default. */
const valueOf = (row, name) => row[name] ?? (fields.get(name)?.default || undefined);

const prompts = new Set(rows.map((row) => row.prompt));
const expired = () => about.expires_at !== null && Date.now() > about.expires_at * 1000;

const scroller = $("scroller"), grid = $("grid"), viewer = $("viewer"), filter = $("filter");
/** What the reader chose. `group`, `across` and `down` are ids of axes, or empty; `size` in CSS pixels. */
const view = { query: "", group: "", across: "", down: "", size: 184 };
