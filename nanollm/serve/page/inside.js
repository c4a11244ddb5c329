/* What the model saw at each token: its probability, the alternatives, and the experts that worked.
 *
 * A token here is {name, bytes, logprob, top: [{name, bytes, logprob}], experts: [[expert, ...] for each MoE block]}.
 * What a tool gave is one token with isGiven, which the model did not draw.
 * Marks, such as the end of a reply, have a name and no bytes. A token may hold half a character, so texts are joined
 * from bytes: a character stands in the token that completes it, and the tokens before show their bytes as a label,
 * which is drawn by the style sheet and never part of the text.
 */

const template = document.getElementById("inside-template");

/** Tokens of one choice of a chunk, in the form above. */
export function tokensOf(choice) {
    return (choice.logprobs?.content ?? []).map(({ top_logprobs = [], experts = [], ...token }) => ({
        ...likely(token),
        top: top_logprobs.map(likely),
        experts,
    }));
}

/** Text that a tool gave, in the form above. */
export function givenToken(text) {
    return { ...likely({ token: text, logprob: 0 }), top: [], experts: [], isGiven: true };
}

function likely({ token, bytes, logprob }) {
    return { name: token, bytes: bytes ?? [...new TextEncoder().encode(token)], logprob };
}

export function percent(share) {
    if (share >= 0.995) return share >= 0.9995 ? "100 %" : `${(100 * share).toFixed(1)} %`;
    if (share < 0.001) return "< 0.1 %";
    return `${(100 * share).toFixed(share < 0.1 ? 1 : 0)} %`;
}

function shareOf(token) {
    return token.isGiven ? "given by a tool" : percent(Math.exp(token.logprob));
}

/** A token by itself, for a label: spaces and line ends can be seen, bytes that are no character are written out. */
function nameOf({ name, bytes }) {
    if (!bytes.length) return name;
    let text;
    try {
        text = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(new Uint8Array(bytes));
    } catch {
        return hex(bytes);
    }
    return text.replaceAll("\n", "↵").replaceAll("\t", "⇥").replaceAll(" ", "·");
}

function hex(bytes) {
    return bytes.map((byte) => byte.toString(16).toUpperCase().padStart(2, "0")).join(" ");
}

function make(tag, className, text = "") {
    const element = document.createElement(tag);
    element.className = className;
    element.textContent = text;
    return element;
}

/** The tokens of one reply on the page, with the panel of the chosen one and the sums over all. */
export class InsideView {
    #tokens = [];
    #decoder = new TextDecoder("utf-8", { ignoreBOM: true });
    #chosen = -1;

    /** model: {moe_blocks, n_routed_experts}, or what is known of it. */
    constructor(place, model) {
        place.replaceChildren(template.content.cloneNode(true));
        this.place = place;
        this.model = model;
        this.row = place.querySelector(".tokens");
        this.panel = place.querySelector(".panel");
        this.whole = place.querySelector(".whole");
        this.row.addEventListener("focusin", ({ target }) => this.#choose([...this.row.children].indexOf(target)));
        this.row.addEventListener("click", ({ target }) => target.closest("[role=option]")?.focus());
        this.row.addEventListener("keydown", (event) => this.#move(event));
    }

    add(tokens) {
        for (const token of tokens) {
            this.#tokens.push(token);
            this.row.append(this.#draw(token));
        }
        if (this.#chosen < 0 && tokens.length) this.row.firstElementChild.tabIndex = 0; // where Tab enters the row
    }

    #draw(token) {
        const text = this.#decoder.decode(new Uint8Array(token.bytes), { stream: true });
        const span = make("span", token.isGiven ? "token given" : "token", text);
        span.setAttribute("role", "option");
        span.setAttribute("aria-selected", "false");
        span.setAttribute("aria-label", `${nameOf(token)}, ${shareOf(token)}`);
        span.tabIndex = -1;
        span.style.setProperty("--surprise", (1 - Math.exp(token.logprob)).toFixed(3));
        if (text.startsWith("\n")) span.dataset.mark = "↵";
        if (text === "") span.dataset.mark = token.bytes.length ? hex(token.bytes) : token.name;
        return span;
    }

    #move(event) {
        const steps = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1, Home: -Infinity, End: Infinity };
        if (event.key in steps && !event.altKey && !event.ctrlKey && !event.metaKey) {
            event.preventDefault();
            const last = this.row.children.length - 1;
            this.row.children[Math.max(0, Math.min(last, this.#chosen + steps[event.key]))].focus();
        }
    }

    #choose(index) {
        this.row.querySelector("[aria-selected=true]")?.setAttribute("aria-selected", "false");
        const span = this.row.children[index];
        for (const other of this.row.querySelectorAll("[tabindex='0']")) other.tabIndex = -1;
        this.#chosen = index;
        span.tabIndex = 0;
        span.setAttribute("aria-selected", "true");
        this.#fillPanel(this.#tokens[index]);
        this.panel.hidden = false;
        this.#showBoth(span);
        span.setAttribute("aria-description", this.panel.innerText.replace(/\s+/g, " "));
    }

    /** On a small screen the panel may lie over the token it speaks of. */
    #showBoth(span) {
        const isCovered = span.getBoundingClientRect().bottom > this.panel.getBoundingClientRect().top;
        (isCovered ? span : this.panel).scrollIntoView({ block: isCovered ? "start" : "nearest" });
    }

    #fillPanel(token) {
        this.panel.classList.add("open");
        this.panel.querySelector(".name").textContent = nameOf(token);
        this.panel.querySelector(".share").textContent = shareOf(token);
        const isSame = (other) => other.name === token.name && hex(other.bytes) === hex(token.bytes);
        const others = token.isGiven || token.top.some(isSame) ? token.top : [...token.top, token];
        this.panel.querySelector(".others").replaceChildren(...others.map((other) => drawBar(other, isSame(other))));
        const routes = token.experts.map((taken, place) => this.#drawRoute(taken, place));
        this.panel.querySelector(".routes").replaceChildren(...routes);
    }

    #drawRoute(taken, place) {
        const line = make("p", "route");
        line.append(make("span", "block", `block ${this.#block(place)}`));
        for (let expert = 0; expert < this.#width(); expert++) {
            const cell = make("span", taken.includes(expert) ? "cell taken" : "cell", String(expert + 1));
            cell.setAttribute("aria-hidden", "true");
            line.append(cell);
        }
        line.append(make("span", "unseen", `: expert ${taken.map((expert) => expert + 1).join(" and ")}`));
        return line;
    }

    #block(place) {
        return this.model.moe_blocks?.[place] ?? place + 1;
    }

    #width() {
        if (this.model.n_routed_experts) return this.model.n_routed_experts;
        const taken = this.#tokens.flatMap((token) => token.experts.flat());
        return taken.reduce((most, expert) => Math.max(most, expert + 1), 0);
    }

    /** The reply is over: show what holds for all of it. */
    finish() {
        const rest = this.#decoder.decode(); // bytes that never became a character
        if (rest) this.row.lastElementChild.append(rest);
        const drawn = this.#tokens.filter((token) => !token.isGiven);
        if (!drawn.length) return;
        const mean = drawn.reduce((sum, token) => sum + token.logprob, 0) / drawn.length;
        const wasFirst = drawn.filter((token) => token.logprob >= (token.top[0]?.logprob ?? -Infinity)).length;
        this.whole.querySelector(".summary").textContent =
            `The most likely token was taken ${percent(wasFirst / drawn.length)} of the time; ` +
            `perplexity ${Math.exp(-mean).toFixed(2)}.`;
        this.#fillShares(drawn);
        this.whole.hidden = this.panel.hidden = false;
    }

    #fillShares(drawn) {
        const blocks = drawn[0].experts.length;
        const table = this.whole.querySelector("table");
        table.hidden = this.whole.querySelector(".over-shares").hidden = blocks === 0;
        const experts = Array.from({ length: this.#width() }, (_, expert) => expert);
        const head = make("tr", "");
        head.append(make("td", "", "expert"), ...experts.map((expert) => scoped("col", String(expert + 1))));
        const rows = Array.from({ length: blocks }, (_, place) => {
            const row = make("tr", "");
            row.append(scoped("row", `block ${this.#block(place)}`));
            for (const expert of experts) {
                const count = drawn.filter((token) => token.experts[place]?.includes(expert)).length;
                row.append(tinted(count / drawn.length));
            }
            return row;
        });
        table.replaceChildren(head, ...rows);
    }
}

function scoped(scope, text) {
    const cell = make("th", "", text);
    cell.scope = scope;
    return cell;
}

function tinted(share) {
    const cell = make("td", "", (100 * share).toFixed(0));
    cell.style.setProperty("--share", share.toFixed(3));
    return cell;
}

function drawBar(other, isTaken) {
    const probability = Math.exp(other.logprob);
    const line = make("li", isTaken ? "other taken" : "other");
    const bar = make("span", "bar");
    bar.setAttribute("aria-hidden", "true");
    bar.style.setProperty("--share", probability.toFixed(4));
    line.append(make("span", "name", nameOf(other)), bar, make("span", "share", percent(probability)));
    return line;
}
