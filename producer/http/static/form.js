// The form: a control for each field of a job, made from the server's own description of a job. A field that is
// added to the table of job fields is here by itself.

/** What the server fills in, and nobody writes. */
const NOT_ASKED = new Set(["file_hashes"]);
/** Fields in sight; all others are under "All fields". */
const MAIN = ["prompt", "negative_prompt", "width", "height", "steps", "guidance_scale", "seed", "scheduler", "model"];
/** From this number of characters on a text has several lines. */
const LONG = 1000;

/** The controls by the field's name: `element`, and `read()`, which gives JSON, or "" where nothing is given. */
const controls = new Map();

async function makeForm() {
  if (controls.size) return;
  let schemas;
  try {
    schemas = (await call("GET", "/openapi.json")).components.schemas;
  } catch (error) {
    $("draw-error").textContent = error.message;
    setTimeout(makeForm, 3000);
    return;
  }
  if (controls.size) return;
  $("draw-error").textContent = "";
  const resolved = (schema) => Object.assign({},
    ...[schemas[schema.$ref?.split("/").pop()], ...(schema.allOf ?? []), ...(schema.anyOf ?? [])]
      .filter((part) => part && part.type !== "null").map(resolved), schema);
  const all = schemas.Job.properties;
  const names = [...MAIN.filter((name) => all[name]), ...Object.keys(all).filter((name) => !MAIN.includes(name) && !NOT_ASKED.has(name))];
  for (const name of names) {
    const control = makeControl(name, resolved(all[name]), schemas.Job.required.includes(name));
    controls.set(name, control);
    $(MAIN.includes(name) ? "main-fields" : "more-fields").append(control.box);
  }
  controls.get("prompt").box.after(promptNote);
  fitSchedules();
  showDefaults();
}

function makeControl(name, schema, isRequired) {
  const title = (fields.get(name)?.label ?? schema.title ?? name).replace(/\b[A-Z](?=[a-z])/g, (letter) => letter.toLowerCase())
    .replace(/^./, (letter) => letter.toUpperCase());
  const box = make("label", "field", title);
  const kind = kindOf(schema);
  const element = make(kind === "choice" ? "select" : kind === "long" || kind === "object" ? "textarea" : "input");
  element.id = `field-${name}`;
  element.name = name;
  element.title = (schema.description ?? "").replaceAll("`", "");
  element.required = isRequired;
  element.autocomplete = "off";
  box.classList.add(`of-${kind}`, `is-${name}`);
  const setUp = { choice: fillChoices, truth: asTruth, number: asNumber, digits: asDigits, object: asObject, list: asList };
  setUp[kind]?.(element, schema);
  if (kind === "long" || kind === "text") {
    element.dir = "auto";
    element.spellcheck = kind === "long" && isRequired;
    if (schema.maxLength) element.maxLength = schema.maxLength;
  }
  if (name === "prompt") element.placeholder = "a small cat on a windowsill";
  if (kind === "long") element.rows = isRequired ? 2 : 1;
  box.append(element);
  if (!MAIN.includes(name) && schema.description) box.append(say(make("small"), schema.description));
  return { box, element, schema, kind, read: () => read(name, element, kind) };
}

/** What a field's control is made as: choice, truth, number, digits (a number that has too many), object, list, long, text. */
function kindOf(schema) {
  if (schema.enum) return "choice";
  if (schema.type === "boolean") return "truth";
  if (schema.type === "number" || schema.type === "integer") {
    return (schema.maximum ?? 0) > Number.MAX_SAFE_INTEGER ? "digits" : "number";
  }
  if (schema.type === "array") return "list";
  if (schema.type === "object") return "object";
  return (schema.maxLength ?? 0) >= LONG ? "long" : "text";
}

function fillChoices(element, schema) {
  // What the workers take where nothing is given may be another choice than the table's default.
  const choices = schema.enum.filter((each) => each !== schema.default || element.name === "prompt_syntax");
  for (const value of ["", ...choices]) {
    const option = make("option", "", value || String(schema.default ?? "not given"));
    option.value = value;
    element.append(option);
  }
}

function asTruth(element, schema) {
  element.type = "checkbox";
  element.checked = schema.default === true;
}

function asNumber(element, schema) {
  element.type = "number";
  if (schema.minimum !== undefined) element.min = schema.minimum;
  if (schema.maximum !== undefined) element.max = schema.maximum;
  element.step = schema.multipleOf ?? (schema.type === "integer" ? 1 : "any");
  element.placeholder = schema.default ?? "";
}

function asDigits(element) {
  element.inputMode = "numeric";
  element.pattern = "-?[0-9]+";
  element.placeholder = "random";
}

function asObject(element) {
  element.rows = 2;
  element.spellcheck = false;
  element.placeholder = "{}";
}

/** LoRAs as a text, which the server reads: detail=0.8; pixel=1:te=0.5. */
function asList(element) {
  element.placeholder = "none";
  element.addEventListener("input", offerLoras);
}

const textOf = (list) => list.some((each) => /[;,:[{]/.test(each.name)) ? JSON.stringify(list) :
  list.map((each) => `${each.name}=${each.weight}${
    each.text_encoder_weight === undefined ? "" : `:te=${each.text_encoder_weight}`}`).join("; ");

/** The names of the LoRAs that the workers offer, and the digests of the files that they had then. */
let loras = [];
let lorasOf = "";

/** Asks for the names again where the workers' files are others. */
async function findLoras() {
  const digests = [...new Set(fleet?.workers.map((each) => each.files))].sort().join();
  if (digests === lorasOf) return;
  lorasOf = digests;
  try {
    loras = (await call("GET", "/v1/loras")).loras.map((each) => each.name);
  } catch {
    lorasOf = "";
  }
  offerLoras();
}

/** Offers names for the last of the LoRAs that are written: those that have what is there of it. */
function offerLoras() {
  const [, before, begun] = /^(.*;\s*)?(.*)$/.exec(controls.get("loras")?.element.value ?? "");
  const found = loras.filter((name) => name.toLowerCase().includes(begun.toLowerCase()));
  offer("loras", found.slice(0, 50).map((name) => `${before ?? ""}${name}=1`));
}

/** What a field of numbers takes, in a sentence. */
function limitsOf({ min, max, step }) {
  const what = step === "any" ? "a number" : step === "1" ? "a whole number" : `a multiple of ${step}`;
  return `write ${what}${min === "" ? "" : ` from ${min}`}${max === "" ? "" : ` to ${max}`}, or nothing.`;
}

/** A field's value as JSON; "" where nothing is given. Throws an `Error` with a sentence. */
function read(name, element, kind) {
  const text = kind === "long" ? element.value : element.value.trim();
  if (kind === "truth") return JSON.stringify(element.checked);
  if (element.validity.badInput) throw wrong(name, `${name} is no number: ${limitsOf(element)}`);
  if (text === "") return "";
  if (kind === "number") {
    if (!element.validity.valid) throw wrong(name, `${name} is ${text}: ${limitsOf(element)}`);
    return String(Number(text));
  }
  if (kind === "digits") {
    if (!/^-?\d+$/.test(text)) throw wrong(name, `${name} is ${text}: write a whole number, or nothing.`);
    return text.replace(/^(-?)0+(?=\d)/, "$1");
  }
  if (kind === "object") {
    try {
      return JSON.stringify(JSON.parse(text));
    } catch {
      throw wrong(name, `${name} is not JSON: write it as {"order": 17}, or leave it empty.`);
    }
  }
  return JSON.stringify(text);
}

const wrong = (name, text) => Object.assign(new Error(text), { field: name });

/** The jobs of the form as JSON, a list: as many as there are to be pictures, each with a seed of its own. */
function readForm() {
  const parts = [];
  for (const [name, control] of controls) {
    const text = control.read();
    if (control.kind === "truth" && JSON.parse(text) === (control.schema.default ?? false)) continue;
    if (text !== "") parts.push([name, text]);
  }
  if (!parts.some(([name]) => name === "prompt")) throw wrong("prompt", "The prompt is empty: say what to draw.");
  const count = Math.max(1, Math.min(100, Math.floor(Number($("images").value) || 1)));
  const seed = parts.find(([name]) => name === "seed")?.[1];
  const job = (number) => {
    const own = parts.filter(([name]) => name !== "seed");
    if (seed !== undefined && seed !== "-1") own.push(["seed", String(BigInt(seed) + BigInt(number))]);
    return `{${own.map(([name, text]) => `${JSON.stringify(name)}:${text}`).join(",")}}`;
  };
  return `[${Array.from({ length: count }, (_, number) => job(number)).join(",")}]`;
}

async function draw() {
  $("draw-error").textContent = $("sent-text").textContent = "";
  $("sent-link").hidden = true;
  for (const { element } of controls.values()) element.removeAttribute("aria-invalid");
  $("draw-button").disabled = true;
  try {
    const sent = await call("POST", "/v1/jobs", readForm());
    $("sent-text").textContent = `${many(sent.jobs.length, "picture")} sent.`;
    $("sent-link").hidden = false;
  } catch (error) {
    say($("draw-error"), error.message);
    const control = controls.get(error.field ?? /^(\w+) (is|has|would)/.exec(error.message)?.[1]);
    if (control) {
      if ($("more").contains(control.element)) $("more").open = true;
      control.element.setAttribute("aria-invalid", "true");
      control.element.focus();
    }
  } finally {
    $("draw-button").disabled = false;
  }
}

/** Puts the fields of a job, as the API has it, into the form. `row` has its seed as a text. */
function fillForm(job, row) {
  for (const [name, { element, kind, schema }] of controls) {
    const value = name === "seed" ? row.seed : job[name];
    if (kind === "truth") element.checked = value ?? schema.default ?? false;
    else if ((value ?? null) === null || value === schema.default) element.value = "";
    else if (kind === "list") element.value = textOf(value);
    else if (kind === "object") element.value = Object.keys(value).length ? JSON.stringify(value) : "";
    else element.value = value;
    if (name === "scheduler") fitSchedules();
  }
  notePrompt();
  grow();
}

/** Shows what the model takes where nothing is given. */
function showDefaults() {
  const worker = fleet?.workers.find((each) => !controls.get("model")?.element.value ||
    each.model === controls.get("model").element.value);
  for (const [name, { element, kind, schema }] of controls) {
    if (kind === "number" && (schema.default ?? null) === null) element.placeholder = worker?.defaults[name] ?? "model's own";
  }
  const syntax = controls.get("prompt_syntax")?.element.options[0];
  if (syntax) syntax.textContent = `the workers' own: ${worker?.prompt_syntax ?? "plain"}`;
  notePrompt();
  offer("model", fleet?.workers.map((each) => each.model));
  offer("vae", fleet?.workers.flatMap((each) => each.vaes));
  findLoras();
  const model = controls.get("model")?.element;
  if (model) model.placeholder = fleet?.workers[0]?.model ?? "default";
}

/** Offers names below a field of text, which takes others as well. */
function offer(field, names) {
  const element = controls.get(field)?.element;
  if (!element) return;
  let options = $(`${field}-names`);
  if (!options) {
    options = make("datalist");
    options.id = `${field}-names`;
    element.after(options);
    element.setAttribute("list", options.id);
  }
  options.replaceChildren(...[...new Set(names)].map((name) => {
    const option = make("option");
    option.value = name;
    return option;
  }));
}

/** Texts of several lines are as high as what is in them. */
function grow() {
  for (const { element, kind } of controls.values()) {
    if (kind !== "long") continue;
    element.style.height = "auto";
    element.style.height = `${Math.min(element.scrollHeight + 2, innerHeight / 2)}px`;
  }
}

$("draw").addEventListener("submit", (event) => { event.preventDefault(); draw(); });
$("draw").addEventListener("input", (event) => {
  event.target.removeAttribute("aria-invalid");
  if (event.target.tagName === "TEXTAREA") grow();
  if (event.target.name === "model") showDefaults();
  if (event.target.name === "scheduler") fitSchedules();
  notePrompt();
});
$("draw").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); draw(); }
});
$("clear").addEventListener("click", () => {
  $("draw").reset();
  $("draw-error").textContent = $("sent-text").textContent = "";
  $("sent-link").hidden = true;
  fitSchedules();
  notePrompt();
  grow();
  controls.get("prompt")?.element.focus();
});
// The browser's own bubbles would hide what the server says.
$("draw").noValidate = true;
