/* What the reader is told when something went wrong. */

/** Something went wrong that the reader should know: a title, what to do, and how. */
export class Trouble extends Error {
    constructor(title, advice, { wait_s = 0, isTooLong = false, status = 0 } = {}) {
        super(title);
        Object.assign(this, { title, advice, wait_s, isTooLong, status });
    }
}

/** The trouble of a conversation that the context cannot hold. */
export function tooLong(message) {
    const advice = `${sentence(message)} Begin a new chat, or ask in fewer words.`;
    return new Trouble("The conversation is too long for this model.", advice, { isTooLong: true });
}

/** Words of an error, as a sentence. */
export function sentence(text) {
    const words = String(text ?? "It gave no reason").trim();
    return words.charAt(0).toUpperCase() + words.slice(1) + (/[.!?]$/.test(words) ? "" : ".");
}
