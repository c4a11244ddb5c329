/* One exchange on the page: a question, its reply as it grows, what went wrong, and what it cost.
 *
 * An exchange is plain values, so that it can be kept while the page reloads. All text goes in as text.
 */

import { InsideView, givenToken, tokensOf } from "./inside.js";

const template = document.getElementById("exchange-template");
const LEAST_WRITING_S = 0.25;

/** status: "waiting" (nothing came yet), "streaming", "done", "stopped" or "failed". */
export function newExchange(question) {
    return { question, attempt: 0, ...unanswered() };
}

/** The fields of an exchange that a further attempt begins anew. */
export function unanswered() {
    return {
        ...{ status: "waiting", reply: "", tokens: [], usage: null, finish: null, trouble: null, seed: null },
        given: [], // [begin, end] of what tools wrote into the reply
        calls: [], // {name, arguments} of functions, which nobody runs here
        ...{ first_s: null, last_s: null, pieces: 0, laterPieces: 0 }, // later: not at the same moment as the first
    };
}

/** Whether more of its reply may come. */
export function isOpen(exchange) {
    return exchange.status === "waiting" || exchange.status === "streaming";
}

/** Take a chunk that arrived `now_s` seconds after the question into its exchange; returns what is new. */
export function take(exchange, chunk, now_s) {
    if (chunk.usage) exchange.usage = chunk.usage;
    const choice = chunk.choices?.[0];
    if (!choice) return { text: "", tokens: [] };
    const fresh = { text: choice.delta?.content ?? "", isGiven: choice.given === true, tokens: tokensOf(choice) };
    if (fresh.isGiven && exchange.tokens.length) fresh.tokens.push(givenToken(fresh.text));
    for (const { index, function: called } of choice.delta?.tool_calls ?? []) {
        const call = (exchange.calls[index] ??= { name: "", arguments: "" });
        call.name += called.name ?? "";
        call.arguments += called.arguments;
    }
    if (fresh.text || fresh.tokens.length || choice.delta?.tool_calls) {
        exchange.status = "streaming";
        exchange.first_s ??= now_s;
        exchange.last_s = now_s;
        exchange.pieces += 1;
        if (now_s > exchange.first_s) exchange.laterPieces += 1;
    }
    if (fresh.isGiven) exchange.given.push([exchange.reply.length, exchange.reply.length + fresh.text.length]);
    exchange.reply += fresh.text;
    exchange.tokens.push(...fresh.tokens);
    exchange.finish = choice.finish_reason ?? exchange.finish;
    return fresh;
}

/** Tokens of the reply, and whether that number is exact: a piece of the stream may hold several. */
export function countTokens(exchange) {
    if (exchange.usage) return { count: exchange.usage.completion_tokens, isExact: true };
    if (exchange.tokens.length && !exchange.given.length) return { count: exchange.tokens.length, isExact: true };
    return { count: exchange.pieces, isExact: false };
}

export function numbersOf(exchange) {
    const { count, isExact } = countTokens(exchange);
    const parts = [`${isExact ? "" : "about "}${count.toLocaleString("en")} token${count === 1 ? "" : "s"}`];
    if (count > 1 && exchange.last_s) parts.push(`${rate(tokensPerSecond(exchange, count))} tokens/s`);
    if (exchange.first_s !== null) parts.push(`${seconds(exchange.first_s)} to the first`);
    if (exchange.seed !== null) parts.push(`seed ${exchange.seed}`);
    return parts;
}

/** How fast it was written, after the first token. A reply that was over in a moment came in a few lumps whose distance
 * says nothing: then all of its tokens over all of the time since the question, which never says too much. */
function tokensPerSecond(exchange, count) {
    const writing_s = exchange.last_s - exchange.first_s;
    if (writing_s < LEAST_WRITING_S) return count / exchange.last_s;
    return (count * exchange.laterPieces) / exchange.pieces / writing_s;
}

function rate(perSecond) {
    return perSecond < 10 ? perSecond.toFixed(1) : Math.round(perSecond).toLocaleString("en");
}

function seconds(value) {
    return value < 1 ? `${Math.round(1000 * value)} ms` : `${value.toFixed(value < 10 ? 1 : 0)} s`;
}

/** One exchange on the page. actions: {retry, renew, model} with `model()` what is known of the model. */
export class ExchangeView {
    #clock = 0;

    constructor(exchange, actions) {
        this.exchange = exchange;
        this.actions = actions;
        this.element = template.content.cloneNode(true).firstElementChild;
        const find = (selector) => this.element.querySelector(selector);
        this.reply = find(".reply");
        this.text = find(".reply > .text");
        this.calls = find(".calls");
        this.place = find(".inside-view");
        this.trouble = find(".trouble");
        this.retry = find(".retry");
        this.under = find(".under");
        find(".question .text").textContent = exchange.question;
        this.retry.addEventListener("click", actions.retry);
        find(".again").addEventListener("click", actions.retry);
        find(".fresh").addEventListener("click", actions.renew);
        find(".copy").addEventListener("click", ({ currentTarget }) => this.#copy(currentTarget));
        this.restart();
    }

    /** Draw all of the exchange anew; its reply may still be growing, and may end in the middle of a character. */
    restart() {
        clearInterval(this.#clock);
        this.text.replaceChildren();
        let drawn = 0;
        for (const [begin, end] of this.exchange.given) {
            this.#addText(this.exchange.reply.slice(drawn, begin), false);
            this.#addText(this.exchange.reply.slice(begin, end), true);
            drawn = end;
        }
        this.#addText(this.exchange.reply.slice(drawn), false);
        this.place.replaceChildren();
        this.inside = null;
        this.#addTokens(this.exchange.tokens);
        if (!isOpen(this.exchange)) this.inside?.finish();
        this.update();
    }

    /** Add what `take` found. */
    add({ text, isGiven, tokens }) {
        this.#addText(text, isGiven);
        this.#addTokens(tokens);
        this.update();
    }

    #addText(text, isGiven) {
        if (text) this.text.append(isGiven ? given(text) : text);
    }

    #addTokens(tokens) {
        if (!tokens.length) return;
        this.inside ??= new InsideView(this.place, this.actions.model());
        this.inside.add(tokens);
    }

    /** The reply is over, one way or another. */
    finish() {
        this.inside?.finish();
        this.update();
        if (this.exchange.trouble) this.#countDown(this.exchange.trouble.wait_s);
    }

    update() {
        const { status, trouble, reply, tokens, calls } = this.exchange;
        this.element.dataset.status = status;
        this.element.dataset.has = tokens.length ? "tokens" : "text";
        this.reply.setAttribute("aria-busy", String(isOpen(this.exchange)));
        this.calls.replaceChildren(...calls.map(callOf));
        this.trouble.hidden = !trouble;
        if (trouble) {
            this.trouble.querySelector(".title").textContent = trouble.title;
            this.trouble.querySelector(".advice").textContent = trouble.advice;
            this.trouble.querySelector(".fresh").hidden = !trouble.isTooLong;
            this.retry.hidden = trouble.isTooLong; // it cannot help
        }
        this.under.hidden = status === "waiting" || (!reply && !tokens.length && !calls.length && Boolean(trouble));
        this.under.querySelector(".copy").hidden = !reply;
        this.#drawNumbers();
    }

    #drawNumbers() {
        const { count, isExact } = countTokens(this.exchange);
        const parts = [...numbersOf(this.exchange), this.#ending(isExact ? count : null)].filter(Boolean);
        const spans = parts.map((text) => Object.assign(document.createElement("span"), { textContent: text }));
        if (this.exchange.given.length) spans.push(given("written by a tool"));
        this.under.querySelector(".numbers").replaceChildren(...spans);
    }

    #ending(count) {
        const { status, reply, finish, usage, calls } = this.exchange;
        const context = this.actions.model().context_length;
        if (status === "stopped") return "stopped";
        if (status === "done" && !reply && !calls.length) return "the model had nothing to say";
        if (finish === "tool_calls") return "the page runs no functions";
        if (status !== "done" || finish !== "length") return "";
        if (context && usage?.total_tokens >= context) return "the context is full: begin a new chat";
        return `ended at the limit of ${count?.toLocaleString("en") ?? "its"} tokens`;
    }

    #countDown(wait_s) {
        const until = performance.now() + 1000 * wait_s;
        const tick = () => {
            const left_s = Math.ceil((until - performance.now()) / 1000);
            this.retry.disabled = left_s > 0;
            this.retry.textContent = left_s > 0 ? `Try again in ${left_s} s` : "Try again";
            if (left_s <= 0) clearInterval(this.#clock);
        };
        clearInterval(this.#clock);
        this.#clock = setInterval(tick, 250);
        tick();
    }

    async #copy(button) {
        const isCopied = await copy(this.exchange.reply);
        const icon = button.querySelector("use");
        icon.setAttribute("href", isCopied ? "#icon-done" : "#icon-trouble");
        button.title = isCopied ? "Copied" : "This browser did not let the page copy; select the text instead";
        setTimeout(() => {
            icon.setAttribute("href", "#icon-copy");
            button.title = "Copy";
        }, 1600);
    }
}

/** A call of a function as a program would write it. */
function callOf(call) {
    return Object.assign(document.createElement("li"), { textContent: `${call.name}(${call.arguments})` });
}

/** Text in the colour of what no model wrote. */
function given(text) {
    return Object.assign(document.createElement("span"), { className: "given", textContent: text });
}

async function copy(text) {
    try {
        await navigator.clipboard.writeText(text); // absent where the page came over plain http from another machine
        return true;
    } catch {
        const area = Object.assign(document.createElement("textarea"), { value: text, className: "unseen" });
        document.body.append(area);
        area.select();
        const isCopied = document.execCommand("copy");
        area.remove();
        return isCopied;
    }
}
