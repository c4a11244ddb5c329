/* The conversation: writing, sending, stopping, asking again, beginning anew.
 *
 * The conversation is a list of exchanges. An exchange whose reply is empty (it failed, or was stopped before its first
 * word) stays on the page but is not told to the model: a conversation is question and answer in turn.
 */

import { ExchangeView, isOpen, newExchange, numbersOf, take, unanswered } from "./exchange.js";
import { readModel, streamReply } from "./server.js";
import { bindSettings, readSettings, samplingOf } from "./settings.js";
import { finish, hear, hush, say } from "./spoken.js";
import { Trouble } from "./trouble.js";

const KEPT = "nanollm.conversation"; // in this tab only, so that a reload loses nothing
const NEAR_END = 48; // pixels from the end of the conversation that still count as its end
const FULL_SHARE = 0.85; // of the context, from which the gauge warns

const byId = (id) => document.getElementById(id);
const page = {};
const NAMES = "scroller welcome conversation latest composer message send stop inside room theme settings";
for (const id of NAMES.split(" ")) page[id] = byId(id);

const settings = readSettings();
const openSettings = bindSettings(byId("settings-dialog"), settings);
const views = []; // one for each exchange
let model = {};
let running = null; // the AbortController of the reply that is being written
let isFollowing = true; // the page scrolls with the reply until the reader scrolls away

// --- asking ---

async function send() {
    const question = page.message.value.trim();
    if (!question || running) return;
    page.message.value = "";
    resize();
    await answer(addView(newExchange(question)));
}

/** Ask the last question again. */
async function again() {
    const view = views.at(-1);
    if (!view || running) return;
    Object.assign(view.exchange, unanswered(), { attempt: view.exchange.attempt + 1 });
    view.restart();
    page.message.focus();
    await answer(view);
}

async function answer(view) {
    const { exchange } = view;
    running = new AbortController();
    isFollowing = true;
    hush();
    keep();
    refresh();
    try {
        await stream(view, running.signal);
        exchange.status = "done";
    } catch (error) {
        exchange.status = error.name === "AbortError" ? "stopped" : "failed";
        if (error.status === 404) model = {}; // another model is served now: ask for its name
        if (exchange.status === "failed") exchange.trouble = troubleFor(error);
        else if (!exchange.reply) exchange.trouble = { title: "Stopped before the first word.", advice: "", wait_s: 0 };
    }
    running = null;
    view.finish();
    finish(ending(exchange));
    keep();
    refresh();
}

async function stream(view, signal) {
    const { exchange } = view;
    if (!model.id) await meetModel();
    signal.throwIfAborted();
    const sampling = samplingOf(settings, exchange.attempt);
    exchange.seed = sampling.seed;
    const began = performance.now();
    for await (const { chunk, at_ms } of streamReply(requestFor(exchange, sampling), signal)) {
        const fresh = take(exchange, chunk, (at_ms - began) / 1000);
        view.add(fresh);
        hear(fresh.text);
        follow();
    }
}

function requestFor(exchange, sampling) {
    const looking = isInside() ? { logprobs: true, top_logprobs: 5, experts: true } : {};
    return { model: model.id, messages: messagesFor(exchange), ...sampling, ...looking };
}

function messagesFor(exchange) {
    const messages = settings.system.trim() ? [{ role: "system", content: settings.system }] : [];
    for (const { exchange: earlier } of views) {
        if (earlier === exchange) break;
        if (!earlier.reply) continue;
        messages.push({ role: "user", content: earlier.question }, { role: "assistant", content: earlier.reply });
    }
    return [...messages, { role: "user", content: exchange.question }];
}

function troubleFor(error) {
    if (!(error instanceof Trouble)) console.error(error); // a fault of the page, or a server that is not ours
    const { title = "The reply could not be read.", advice = String(error), wait_s = 0, isTooLong = false } = error;
    return { title, advice, wait_s, isTooLong };
}

function ending(exchange) {
    const { trouble, status } = exchange;
    if (trouble) return `${trouble.title} ${trouble.advice}`;
    return `${status === "stopped" ? "Stopped" : "End of the reply"}: ${numbersOf(exchange)[0]}.`;
}

function stop() {
    running?.abort();
    page.message.focus();
}

/** Begin a new conversation. */
function renew() {
    running?.abort();
    views.splice(0).forEach((view) => view.element.remove());
    hush();
    keep();
    refresh();
    page.message.focus();
}

async function meetModel() {
    model = await readModel(announce);
    byId("model-name").textContent = model.id;
    document.title = `${model.id} · NanoLLM`;
    byId("examples").replaceChildren(...(model.examples ?? []).map(exampleOf));
    for (const view of views) if (view.inside) view.restart(); // it was drawn before the names of its blocks were known
    refresh();
}

/** Say something in the place of the questions to choose from. */
function announce(words) {
    byId("examples").textContent = words;
}

/** A button that asks a question the model was trained for. */
function exampleOf(question) {
    const button = document.createElement("button");
    Object.assign(button, { type: "button", className: "quiet", textContent: question });
    button.addEventListener("click", () => {
        page.message.value = question;
        send();
    });
    return button;
}

// --- what stays when the page is loaded again ---

function keep() {
    try {
        sessionStorage.setItem(KEPT, JSON.stringify(views.map((view) => view.exchange)));
    } catch {
        console.info("the conversation is too large for this browser to keep: a reload will lose it");
    }
}

function restore() {
    try {
        for (const exchange of JSON.parse(sessionStorage.getItem(KEPT) ?? "[]")) {
            if (isOpen(exchange)) exchange.status = "stopped";
            addView(exchange);
        }
    } catch {
        console.info("no conversation can be read in this browser: a new one begins");
        renew(); // what was drawn before the fault goes, too
    }
}

// --- the page around the conversation ---

function addView(exchange) {
    const view = new ExchangeView(exchange, { retry: again, renew, model: () => model });
    views.push(view);
    page.conversation.append(view.element);
    return view;
}

function refresh() {
    page.welcome.hidden = views.length > 0;
    page.send.hidden = running !== null;
    page.stop.hidden = running === null;
    page.send.disabled = !page.message.value.trim();
    showRoom();
    follow();
}

function showRoom() {
    const used = views.findLast((view) => view.exchange.usage)?.exchange.usage.total_tokens ?? 0;
    const newest = views.findLast((view) => view.exchange.reply);
    const isExact = !newest || Boolean(newest.exchange.usage); // a reply that was stopped came without its numbers
    page.room.hidden = !model.context_length;
    if (page.room.hidden) return;
    const count = (number) => number.toLocaleString("en");
    byId("room-text").textContent = `${isExact ? "" : "over "}${count(used)} of ${count(model.context_length)} tokens`;
    page.room.style.setProperty("--share", Math.min(1, used / model.context_length).toFixed(3));
    page.room.classList.toggle("nearly-full", used >= FULL_SHARE * model.context_length);
}

function isInside() {
    return page.inside.getAttribute("aria-pressed") === "true";
}

function toggleInside() {
    page.inside.setAttribute("aria-pressed", String(!isInside()));
    document.body.classList.toggle("looks-inside", isInside());
    say(isInside() ? "Looking inside, from the next reply on." : "No longer looking inside.");
    follow();
}

function follow() {
    if (isFollowing) page.scroller.scrollTop = page.scroller.scrollHeight;
    page.latest.hidden = isFollowing;
}

function resize() {
    page.message.style.height = "auto";
    page.message.style.height = `${page.message.scrollHeight}px`;
    page.send.disabled = !page.message.value.trim();
}

// --- what the reader does ---

const SHORTCUTS = {
    KeyR: again,
    KeyN: renew,
    KeyI: toggleInside,
    KeyM: () => page.theme.click(),
    KeyO: openSettings,
};

function press(event) {
    if (byId("settings-dialog").open) return;
    if (event.key === "Escape" && running) stop();
    else if (event.altKey && !event.ctrlKey && !event.metaKey && event.code in SHORTCUTS) SHORTCUTS[event.code]();
    else if (event.key === "/" && !event.target.closest("input, textarea")) page.message.focus();
    else return;
    event.preventDefault();
}

page.composer.addEventListener("submit", (event) => {
    event.preventDefault();
    send();
});
page.message.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    send();
});
page.message.addEventListener("input", resize);
page.stop.addEventListener("click", stop);
page.inside.addEventListener("click", toggleInside);
byId("new").addEventListener("click", renew);
page.settings.addEventListener("click", openSettings);
document.addEventListener("keydown", press);
page.latest.addEventListener("click", () => {
    isFollowing = true;
    follow();
});
page.scroller.addEventListener("scroll", () => {
    const { scrollHeight, scrollTop, clientHeight } = page.scroller;
    isFollowing = scrollHeight - scrollTop - clientHeight < NEAR_END;
    page.latest.hidden = isFollowing;
});

restore();
resize();
refresh();
meetModel().catch((error) => {
    const { title, advice } = troubleFor(error);
    announce(`${title} ${advice}`); // the model is asked for again with the first message
});
