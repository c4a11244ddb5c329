/* The page's requests to the server.
 *
 * OpenAI's chat completions as server-sent events: lines `data: {json}` between empty lines, at last `data: [DONE]`.
 * Chunks of the network may end anywhere: in a line, in a character, between \r and \n.
 */

import { Trouble, sentence, tooLong } from "./trouble.js";

const ROUTES = new URL("../v1/", import.meta.url);

function lost() {
    return new Trouble("The connection was lost in the middle of the reply.", "What had come until then stays.");
}

/** The model that answers: {id, context_length, moe_blocks, n_routed_experts}. */
export async function readModel() {
    const response = await ask("models", {});
    const models = await response.json();
    return models.data[0];
}

/** The chunks of a reply and when they arrived, {chunk, at_ms}, until it is over.
 *
 * Trouble when it cannot be finished, AbortError when it was stopped.
 */
export async function* streamReply(request, signal) {
    const response = await ask("chat/completions", {
        method: "POST",
        headers: { "Content-Type": "application/json", Accept: "text/event-stream" },
        body: JSON.stringify({ ...request, stream: true, stream_options: { include_usage: true } }),
        signal,
    });
    for await (const { data, at_ms } of readEvents(response.body, signal)) {
        if (data === "[DONE]") return;
        const chunk = JSON.parse(data);
        if (chunk.error) throw new Trouble("The server ended the reply.", sentence(chunk.error.message));
        yield { chunk, at_ms };
    }
    throw lost();
}

async function ask(route, options) {
    let response;
    try {
        response = await fetch(new URL(route, ROUTES), options);
    } catch (error) {
        if (error.name === "AbortError") throw error;
        throw new Trouble("The server cannot be reached.", "See whether nanollm serve is still running.");
    }
    if (!response.ok) throw await troubleOf(response);
    return response;
}

async function troubleOf(response) {
    const text = await response.text();
    const { message = `${response.status} ${response.statusText}`, code = "" } = readError(text);
    const wait_s = Math.min(Number(response.headers.get("Retry-After")) || 0, 600);
    if (response.status === 401) {
        const advice = "Reload this page and give the key as the password; any user name will do.";
        return new Trouble("The server asks for its key.", advice);
    }
    if (response.status === 429 || (response.status === 503 && wait_s)) {
        const advice = "Others are being answered. Your message waits here.";
        return new Trouble("The server is busy.", advice, { wait_s: wait_s || 2 });
    }
    if (response.status === 413 || code === "context_length_exceeded") return tooLong(message);
    const title = response.status < 500 ? "The server did not accept this." : "The server could not answer.";
    return new Trouble(title, sentence(message), { wait_s, status: response.status });
}

function readError(text) {
    try {
        return JSON.parse(text).error ?? {};
    } catch {
        return {}; // a proxy between us and the server answered in its own words; the status says enough
    }
}

/** The events of a byte stream as {data, at_ms}; those that the browser hands over together have one time. */
export async function* readEvents(body, signal) {
    const reader = body.getReader();
    const decoder = new TextDecoder();
    const lines = new EventLines();
    try {
        for (;;) {
            const { done, value } = await reader.read().catch((error) => {
                throw signal?.aborted ? error : lost();
            });
            const at_ms = performance.now();
            const text = done ? decoder.decode() : decoder.decode(value, { stream: true });
            for (const data of lines.push(text)) yield { data, at_ms };
            if (done) return;
        }
    } finally {
        reader.cancel().catch(() => console.debug("the stream had ended already"));
    }
}

/** Pieces of text become events; the rest of a piece waits for the next. */
export class EventLines {
    #rest = "";
    #data = [];

    *push(text) {
        this.#rest += text;
        for (let end; (end = /\r\n|\n|\r(?=[^])/.exec(this.#rest)); ) {
            const line = this.#rest.slice(0, end.index);
            this.#rest = this.#rest.slice(end.index + end[0].length);
            if (line.startsWith("data:")) this.#data.push(line.slice(line[5] === " " ? 6 : 5));
            else if (line === "" && this.#data.length) yield this.#data.splice(0).join("\n");
        }
    }
}
