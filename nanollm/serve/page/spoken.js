/* What a screen reader says.
 *
 * A reply that arrives token by token is no pleasure to listen to, so it is handed to the screen reader sentence by
 * sentence, in a log of its own beside the conversation.
 */

const log = document.getElementById("spoken");
const SENTENCE = /^[^]*?(?:[.!?:]\s|\n)/;

let waiting = "";

/** More of a reply; said when its sentence is complete. */
export function hear(text) {
    waiting += text;
    for (let sentence; (sentence = SENTENCE.exec(waiting)?.[0]); ) {
        waiting = waiting.slice(sentence.length);
        say(sentence);
    }
}

/** The reply is over: say what is left, and how it ended. */
export function finish(words) {
    say(waiting);
    waiting = "";
    say(words);
}

export function say(words) {
    if (!words.trim()) return;
    const line = document.createElement("p");
    line.textContent = words.trim();
    log.append(line);
}

export function hush() {
    waiting = "";
    log.replaceChildren();
}
