// What rows can be grouped by or laid out by: the axes of the run's grid, then each field and each key of the
// metadata that has a few values.

/** Values of a field or of a metadata key, at most. The axes of a run's grid may have more. */
const MOST_VALUES = 40;

const axes = findAxes();
const axisOf = new Map(axes.map((axis) => [axis.id, axis]));

/** An axis: `id`, `label`, `kind` ("axis" or "field"), `get(row)`, `values` (counts) and `order` of the values. */
function findAxes() {
  const found = new Map();
  const add = (id, label, kind, get) => {
    if (!found.has(id)) found.set(id, { id, label, kind, get, values: new Map() });
  };
  for (const row of rows) {
    for (const name of Object.keys(row.grid ?? {})) {
      add(`axis:${name}`, labelOf(name), "axis", (each) => each.grid?.[name] ?? valueOf(each, name));
    }
  }
  for (const [name, { label }] of fields) {
    if (name === "prompt" || found.has(`axis:${name}`)) continue;
    add(`field:${name}`, label, "field", (each) => valueOf(each, name));
  }
  for (const row of rows) {
    for (const name of Object.keys(row.metadata ?? {})) {
      if (!found.has(`axis:${name}`)) add(`meta:${name}`, name, "field", (each) => each.metadata?.[name]);
    }
  }
  for (const axis of found.values()) {
    for (const row of rows) {
      const value = axis.get(row) ?? "";
      axis.values.set(value, (axis.values.get(value) ?? 0) + 1);
      if (axis.values.size > MOST_VALUES && axis.kind !== "axis") break;
    }
    axis.order = inOrder([...axis.values.keys()], axis.kind);
  }
  return [...found.values()].filter((axis) => axis.values.size > 1 &&
    (axis.kind === "axis" || axis.values.size <= Math.min(MOST_VALUES, rows.length - 1)));
}

/** Numbers by size, "512x768" by its first number; texts of an axis as they were given, others by letter. */
function inOrder(values, kind) {
  const given = values.filter((value) => value !== "");
  const numeric = given.length && given.every((value) => /^-?[\d.]+(x\d+)?$/.test(value));
  if (numeric) given.sort((a, b) => parseFloat(a) - parseFloat(b) || a.localeCompare(b, "en", { numeric: true }));
  else if (kind !== "axis") given.sort((a, b) => a.localeCompare(b, "en", { numeric: true }));
  return given.length < values.length ? [...given, ""] : given;
}

/** The view of a page just opened: the run's grid where it has one, and prompts that repeat as groups. */
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
  if (prompts.size > 1 || view.group) add($("group"), "prompt", labelOf("prompt"));
  for (const axis of axes) for (const id of ["group", "across", "down"]) add($(id), axis.id, axis.label);
  for (const id of ["group", "across", "down"]) {
    $(id).value = view[id];
    $(id).parentElement.hidden = $(id).length < 2;
    $(id).addEventListener("change", () => { view[id] = $(id).value; arrange(); });
  }
  $("down").disabled = !view.across;
}
