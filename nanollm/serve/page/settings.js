/* The settings of a reply, and what this browser remembers of them.
 *
 * One object of plain values, kept in localStorage. What comes back from there is looked at as if a stranger had
 * written it: a value that does not fit is replaced by its default.
 */

const KEY = "nanollm.settings";
const FORGETFUL = "This browser keeps nothing: the settings hold until the page is closed.";

export const DEFAULTS = Object.freeze({
    system: "",
    schema: "", // of a reply: JSON, kept as it was typed
    tools: "", // functions that may be called, the same
    temperature: 0.8,
    top_p: 1,
    top_k: 0,
    max_tokens: null, // null: as many as the server gives
    seed: null, // null: a new one for each reply
});

const NUMBERS = {
    temperature: { least: 0, most: 2 },
    top_p: { least: 0.01, most: 1 },
    top_k: { least: 0, most: 1_000_000, isWhole: true },
    max_tokens: { least: 1, most: 1_000_000, isWhole: true, mayBeNull: true },
    seed: { least: 0, most: 2_147_483_647, isWhole: true, mayBeNull: true },
};

const TEXTS = {
    system: { fits: () => true, advice: "At most 100,000 characters." },
    schema: { fits: (value) => value?.constructor === Object, advice: 'JSON as {"type": "object"}, or nothing.' },
    tools: { fits: Array.isArray, advice: 'JSON as [{"type": "function", "function": {"name": "add"}}], or nothing.' },
};

function parse(text) {
    try {
        return JSON.parse(text);
    } catch {
        return undefined; // which no field takes
    }
}

function fits(name, value) {
    if (name in TEXTS) {
        const isShort = typeof value === "string" && value.length <= 100_000;
        return isShort && (!value.trim() || TEXTS[name].fits(parse(value)));
    }
    const { least, most, isWhole, mayBeNull } = NUMBERS[name];
    if (value === null) return Boolean(mayBeNull);
    return Number.isFinite(value) && value >= least && value <= most && (!isWhole || Number.isInteger(value));
}

function advice(name) {
    if (name in TEXTS) return TEXTS[name].advice;
    const { least, most, isWhole, mayBeNull } = NUMBERS[name];
    const kind = isWhole ? "A whole number" : "A number";
    return `${kind} from ${least} to ${most.toLocaleString("en")}${mayBeNull ? ", or nothing" : ""}.`;
}

export function readSettings() {
    const settings = { ...DEFAULTS };
    try {
        const kept = JSON.parse(localStorage.getItem(KEY) ?? "{}");
        for (const name of Object.keys(DEFAULTS)) {
            if (Object.hasOwn(kept ?? {}, name) && fits(name, kept[name])) settings[name] = kept[name];
        }
    } catch {
        console.info("no settings can be read in this browser: the defaults hold");
    }
    return settings;
}

/** True when the browser will remember them. */
function keep(settings) {
    try {
        localStorage.setItem(KEY, JSON.stringify(settings));
        return true;
    } catch {
        return false;
    }
}

/** The part of a request that they decide. A fixed seed moves on by one with each further attempt at a reply. */
export function samplingOf(settings, attempt) {
    const { temperature, top_p, top_k, max_tokens, seed } = settings;
    const drawn = seed === null ? crypto.getRandomValues(new Uint32Array(1))[0] % 2_147_483_648 : seed + attempt;
    const [schema, tools] = [parse(settings.schema), parse(settings.tools)];
    return {
        ...{ temperature, top_p, top_k, max_tokens, seed: drawn },
        ...(schema && { response_format: { type: "json_schema", json_schema: { name: "page", schema } } }),
        ...(tools && { tools }),
    };
}

/** Fill the dialog from `settings`, and write every change that fits into it and into the browser's memory. */
export function bindSettings(dialog, settings) {
    const form = dialog.querySelector("form");
    const status = form.querySelector("[role=status]");
    const fields = Object.keys(DEFAULTS).map((name) => form.elements[name]);
    const helps = new Map(fields.map((field) => [field, field.parentElement.querySelector(".help")]));
    const texts = new Map(fields.map((field) => [field, helps.get(field).textContent]));

    for (const field of fields) {
        helps.get(field).id = `${field.id}-help`;
        field.setAttribute("aria-describedby", helps.get(field).id);
    }

    function judge(field, isGood) {
        if (isGood) field.removeAttribute("aria-invalid");
        else field.setAttribute("aria-invalid", "true");
        helps.get(field).textContent = isGood ? texts.get(field) : advice(field.name);
    }

    function fill() {
        for (const field of fields) {
            field.value = settings[field.name] ?? "";
            judge(field, true);
        }
    }

    function take(field) {
        const typed = field.value.trim();
        const isBroken = field.validity.badInput; // letters in a number field: its value reads as empty
        const value = field.name in TEXTS ? field.value : typed === "" ? null : Number(typed);
        const isGood = !isBroken && fits(field.name, value);
        judge(field, isGood);
        if (!isGood) return;
        settings[field.name] = value;
        status.textContent = keep(settings) ? "" : FORGETFUL;
    }

    form.addEventListener("input", (event) => take(event.target));
    form.addEventListener("submit", (event) => {
        event.preventDefault();
        const wrong = fields.find((field) => field.getAttribute("aria-invalid"));
        if (wrong) wrong.focus();
        else dialog.close();
    });
    form.querySelector("#reset-settings").addEventListener("click", () => {
        Object.assign(settings, DEFAULTS);
        fill();
        status.textContent = keep(settings) ? "The defaults hold again." : FORGETFUL;
    });
    form.querySelector("#close-settings").addEventListener("click", () => dialog.close());
    dialog.addEventListener("click", (event) => {
        if (event.target === dialog) dialog.close(); // the backdrop
    });
    return () => {
        status.textContent = "";
        fill();
        dialog.showModal();
    };
}
