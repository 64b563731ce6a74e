// The filter. A row is shown when it matches every term: a word, "a phrase", -excluded, field:value.

/** Beside the fields of a job: whether a value must be equal, or only contain what was typed. */
const OTHER_FIELDS = new Map([["id", { exact: false }], ["state", { exact: true }], ["error", { exact: false }]]);
const fieldOf = (name) => fields.get(name) ?? OTHER_FIELDS.get(name);
const searched = [...fields.values()].filter((field) => field.searched).map((field) => field.name);

/** What words and phrases are looked for in, in lower case; kept with the row. */
function searchText(row) {
  row.text ??= [...searched.map((name) => row[name]), row.id, row.state, row.error_type, row.error,
    ...Object.values(row.grid ?? {}), ...Object.values(row.metadata ?? {})]
    .filter(Boolean).join("\n").toLowerCase();
  return row.text;
}

/** Makes the texts in idle moments, so that the first letter typed takes no longer than the others. */
function prepareSearchTexts(from = 0) {
  for (const row of rows.slice(from, from + 200)) searchText(row);
  if (from + 200 < rows.length) whenIdle(() => prepareSearchTexts(from + 200));
}

/** A function that says whether a row matches `query`. */
function matcher(query) {
  const tests = [];
  for (const [, not, name, phrase, word] of
    query.toLowerCase().matchAll(/(-?)(?:([a-z_]+):)?(?:"([^"]*)"?|(\S+))/g)) {
    const field = name && fieldOf(name);
    // "nothing:here" names no field: then it is a word like others.
    const wanted = (field || !name ? "" : `${name}:`) + (phrase ?? word);
    if (wanted === "") continue;
    const value = (row) => String(valueOf(row, name) ?? "").toLowerCase();
    const test = !field ? (row) => searchText(row).includes(wanted)
      : field.exact ? (row) => value(row) === wanted
      : (row) => value(row).includes(wanted);
    tests.push(not ? (row) => !test(row) : test);
  }
  return (row) => tests.every((test) => test(row));
}

function setFilter(text) {
  filter.value = text;
  view.query = text;
  arrange();
}

function showCount() {
  const all = shown.length === rows.length;
  $("count").textContent = all ? "" : `${format.format(shown.length)} of ${format.format(rows.length)}`;
}
